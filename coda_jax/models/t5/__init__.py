"""T5: text to text. Also v1.1, flan-T5, mT5, byT5, umT5, and their encoders alone."""

from coda_jax.models.base import Family
from coda_jax.models.t5.config import PRESETS, TINY, T5Config, infer_config
from coda_jax.models.t5.huggingface import HUGGINGFACE
from coda_jax.models.t5.inputs import INPUTS


def _objectives(config: T5Config) -> tuple[str, ...]:
    """Text by a decoder; of an encoder alone what its head is for, or its outputs."""
    if config.num_decoder_layers:
        return ("seq2seq",)
    return (config.head or "embedding",)


FAMILY = Family(
    config=T5Config,
    presets=PRESETS,
    tiny=TINY,
    objectives=_objectives,
    huggingface=HUGGINGFACE,
    inputs=INPUTS,
    profile_scopes={
        "attention": ("attention", "relpos_bias", "self_attention", "encoder_decoder_attention"),
        "mlp": ("mlp", "pre_mlp_layer_norm"),
    },
    infer_config=infer_config,
)
