"""w2v-BERT 2.0: a speech encoder with a CTC head, or with T5's decoder."""

from coda_jax.models.base import Family
from coda_jax.models.w2v_bert.config import PRESETS, TINY, W2vBertConfig
from coda_jax.models.w2v_bert.huggingface import HUGGINGFACE
from coda_jax.models.w2v_bert.inputs import INPUTS


def _objectives(config: W2vBertConfig) -> tuple[str, ...]:
    """Text by a decoder or by CTC, and pretraining without transcripts."""
    if config.num_decoder_layers:
        return ("seq2seq", "best_rq")
    return ("ctc", "best_rq")


FAMILY = Family(
    config=W2vBertConfig,
    presets=PRESETS,
    tiny=TINY,
    objectives=_objectives,
    huggingface=HUGGINGFACE,
    inputs=INPUTS,
    profile_scopes={
        "attention": (
            "attention",
            "pre_attention_layer_norm",
            "self_attention",
            "encoder_decoder_attention",
        ),
        "convolution": ("convolution",),
        "mlp": (
            "first_mlp",
            "second_mlp",
            "pre_second_mlp_layer_norm",
            "mlp",
            "pre_mlp_layer_norm",
        ),
        "features": ("feature_projection",),
    },
)
