"""What a model's arithmetic should cost: floating-point operations and bytes counted by hand.

A multiplication and the addition of its result count as two, as in XLA's cost analysis. Only
matrix products and convolutions are counted; norms, softmaxes and sorts are a few per cent more.

Axis letters: B batch, N input tokens, T output tokens.
"""

import numpy as np

from coda_jax.methods.base import LayerFlops, Place
from coda_jax.methods.cross_attention import tokens_read
from coda_jax.models import ModelConfig


def encoder_flops(config: ModelConfig, batch: int, length: int) -> float:
    """Operations of encoding B rows of N tokens, with methods, embedding of patches or frames."""
    rows = batch * (config.input_flops(length) + _layers(config, "encoder", length, length))
    return rows + _call(config, "encoder")


def answer_flops(config: ModelConfig, batch: int, length: int, target_length: int) -> float:
    """Operations of encoding B rows of N tokens and giving their outputs.

    With a decoder, T tokens of each row are decoded greedily. Keys and values are cached: those of
    the input are computed once, and self-attention reads the whole cache of T places in each step.
    Without one, a head is applied to the encoder's outputs.
    """
    layers = _layers(config, "decoder", target_length, length)
    rows = batch * (layers + config.output_flops(length, target_length))
    return encoder_flops(config, batch, length) + rows + _call(config, "decoder")


def step_bytes(
    config: ModelConfig, batch: int, length: int, target_length: int, num_beams: int = 1
) -> int:
    """Bytes that a decoding step reads: its frozen weights, and the keys and values of each row.

    Those are of the input tokens that it reads, which the M beams of a row share, and of T places
    of each beam.
    """
    projections = [p for place in config.places("decoder") for p in config.projections(place)]
    weights = sum(p.inputs * p.outputs for p in projections if p.rows == "tokens")
    keys_values = sum(p.outputs for p in projections if p.rows == "context")
    places = batch * (tokens_read(config, length) + num_beams * target_length)
    head = config.output_flops(length, 1) // 2
    numbers = weights + keys_values * places + head
    return int(numbers) * np.dtype(config.dtype).itemsize


def _layers(config: ModelConfig, stack: str, tokens: int, context: int) -> float:
    """Operations of all layers of a stack on one row."""
    return sum(_layer(config, place)(tokens, context) for place in config.places(stack))


def _call(config: ModelConfig, stack: str) -> float:
    """Operations that methods need once a call, however many rows there are."""
    return sum(m.call_flops(p, config) for m in config.methods for p in config.places(stack))


def _layer(config: ModelConfig, place: Place) -> LayerFlops:
    """(tokens, context) -> operations of a layer of one row with the methods around it."""

    def frozen(tokens, context):
        rows = {"tokens": tokens, "context": context}
        products = (2 * rows[p.rows] * p.inputs * p.outputs for p in config.projections(place))
        return sum(products) + config.mixing_flops(place, tokens, context)

    flops: LayerFlops = frozen
    for method in config.methods:
        flops = method.wrap_flops(flops, place, config)
    return flops
