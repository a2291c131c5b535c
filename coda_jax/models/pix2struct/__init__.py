"""Pix2Struct: images to text."""

from coda_jax.models.base import Family
from coda_jax.models.pix2struct.config import PRESETS, TINY, Pix2StructConfig
from coda_jax.models.pix2struct.huggingface import HUGGINGFACE
from coda_jax.models.pix2struct.inputs import INPUTS

FAMILY = Family(
    config=Pix2StructConfig,
    presets=PRESETS,
    tiny=TINY,
    objectives=lambda config: ("seq2seq",),
    huggingface=HUGGINGFACE,
    inputs=INPUTS,
    profile_scopes={
        "attention": ("attention", "self_attention", "encoder_decoder_attention"),
        "mlp": ("mlp", "pre_mlp_layer_norm"),
        "patches": ("patch_embedder",),
    },
)
