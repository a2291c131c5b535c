"""What a model's arithmetic should cost: floating-point operations counted by hand.

A multiplication and the addition of its result count as two, as in XLA's cost analysis. Only
matrix products and convolutions are counted; norms, softmaxes and sorts are a few per cent more.

Axis letters: B batch, N input tokens, K selected tokens, T output tokens.
"""

from coda_jax.network import T5Config
from coda_jax.routing import capacity
from coda_jax.speech import W2vBertConfig
from coda_jax.vision import Pix2StructConfig


def encoder_flops(config: T5Config, batch: int, length: int) -> float:
    """Operations of encoding B rows of N tokens, with adapters, routers, embedding of patches
    or features.

    Each layer works on K = ceil(N / r) tokens, which attend to each other or to all N.
    """
    input_dim = 0
    if isinstance(config, Pix2StructConfig):
        input_dim = config.patch_dim
    elif isinstance(config, W2vBertConfig):
        input_dim = config.feature_dim
    total = 2 * batch * length * input_dim * config.emb_dim
    frozen_layer = _conformer if isinstance(config, W2vBertConfig) else _t5
    for reduction in _reductions(config):
        selected = capacity(length, reduction)
        k_to_all = config.coda is not None and config.coda.attention == "k_to_all"
        total += frozen_layer(config, batch, selected, length if k_to_all else selected)
        total += _adapter(config, batch, length)
        if reduction > 1 and config.coda.routing != "truncation":
            total += 2 * batch * length * config.emb_dim
    return total


def answer_flops(config: T5Config, batch: int, length: int, target_length: int) -> float:
    """Operations of encoding B rows of N tokens and decoding T tokens of each greedily.

    Keys and values are cached: those of the input are computed once. Self-attention reads the whole
    cache of T places in each step.
    """
    steps = target_length
    decoder = _keys_values(config, batch, length)
    decoder += steps * _attention(config, batch, 1, length)
    decoder += steps * (
        _attention(config, batch, 1, target_length) + _keys_values(config, batch, 1)
    )
    decoder += steps * (_mlp(config, batch, 1) + _adapter(config, batch, 1))
    logits = 2 * steps * batch * config.emb_dim * config.vocab_size
    return encoder_flops(config, batch, length) + config.num_decoder_layers * decoder + logits


def _reductions(config: T5Config) -> tuple[float, ...]:
    if config.coda is None:
        return (1,) * config.num_encoder_layers
    return config.coda.reductions(config.num_encoder_layers)


def _t5(config, batch, selected, context):
    """A T5 layer on `selected` tokens, which attend to `context` tokens."""
    return (
        _attention(config, batch, selected, context)
        + _keys_values(config, batch, context)
        + _mlp(config, batch, selected)
    )


def _conformer(config, batch, selected, context):
    """A Conformer layer: its first feed-forward is for all frames that are attended to."""
    distances = config.max_left_distance + 1 + config.max_right_distance
    mlp = 2 * 2 * batch * config.emb_dim * config.mlp_dim
    convolution = 2 * batch * selected * config.emb_dim * (3 * config.emb_dim + config.conv_width)
    return (
        _attention(config, batch, selected, context)
        + 2 * batch * selected * config.num_heads * config.head_dim * distances
        + _keys_values(config, batch, context)
        + mlp * (selected + context)
        + convolution
    )


def _keys_values(config, batch, length):
    return 2 * 2 * batch * length * config.emb_dim * config.num_heads * config.head_dim


def _attention(config, batch, queries, keys):
    """Projections of queries and outputs, logits, and the weighted sum of the values."""
    width = config.num_heads * config.head_dim
    return 2 * 2 * batch * queries * width * (config.emb_dim + keys)


def _mlp(config, batch, length):
    kernels = len(config.mlp_activations) + 1
    return kernels * 2 * batch * length * config.emb_dim * config.mlp_dim


def _adapter(config, batch, length):
    if config.adapter is None:
        return 0
    return 2 * 2 * batch * length * config.emb_dim * config.adapter.bottleneck
