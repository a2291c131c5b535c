"""T5: text to text. Also v1.1, flan-T5, mT5 and byT5."""

from coda_jax.models.base import Family
from coda_jax.models.t5.config import PRESETS, TINY, T5Config, infer_config
from coda_jax.models.t5.huggingface import HUGGINGFACE
from coda_jax.models.t5.inputs import INPUTS

FAMILY = Family(
    config=T5Config,
    presets=PRESETS,
    tiny=TINY,
    objectives=lambda config: ("seq2seq",),
    huggingface=HUGGINGFACE,
    inputs=INPUTS,
    profile_scopes={
        "attention": ("attention", "relpos_bias"),
        "mlp": ("mlp", "pre_mlp_layer_norm"),
    },
    infer_config=infer_config,
)
