"""Which tokens of the encoding a decoder attends to: all, or those that the last layer selected.

    encoding = norm(y)[idx]     [B, K, D]   idx, K of the last encoder layer: (3) of docs/method.md

Their order means nothing to attention without positions. Those of a segment stand together and
empty slots at the end, so that the mask of the slots follows from the inputs: whoever holds the
encoding and the inputs can decode.

Axis letters: B batch, N tokens, K slots (the static capacity), n either, S segments, D embedding.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.methods.coda import routing_of
from coda_jax.nn.tokens import Selection, take


def reads_selected(config: Any) -> bool:
    """Whether the decoder attends to selected tokens alone."""
    routing = routing_of(config.methods)
    return routing is not None and routing.cross_attention == "selected"


def tokens_read(config: Any, length: int) -> int:
    """How many of the N tokens of a row, or slots for some, the decoder attends to."""
    routing = routing_of(config.methods)
    return length if routing is None else routing.tokens_read(length, config)


@jax.named_scope("gather")
def encoding_read(
    config: Any,
    encoded: Float[Array, "b n d"],
    selection: Selection | None,
    segment_ids: Int[Array, "b n"] | None = None,
) -> Float[Array, "b k d"]:
    """What the decoder attends to, [B, n, D].

    Args:
        config: of the model.
        encoded: [B, N, D].
        selection: of the last encoder layer; None for all tokens.
        segment_ids: [B, N] for packed examples.
    """
    if selection is None or not reads_selected(config):
        return encoded
    segments = 1 if segment_ids is None else take(segment_ids, selection.indices)
    order = jnp.where(selection.valid, segments, jnp.iinfo(jnp.int32).max)
    _, indices = lax.sort((order, selection.indices), num_keys=2)
    return take(encoded, indices)


def segments_read(
    config: Any,
    mask: Bool[Array, "b n"],
    segment_ids: Int[Array, "b n"] | None = None,
) -> Int[Array, "b k"]:
    """The segment of each token of `encoding_read`, [B, n]; 1 in unpacked rows, 0 for none.

    Args:
        config: of the model.
        mask: [B, N], False for padding.
        segment_ids: [B, N] for packed examples.
    """
    routing = routing_of(config.methods)
    reduction = routing.reductions(config.num_encoder_layers)[-1] if reads_selected(config) else 1
    if reduction == 1:
        return mask.astype(jnp.int32) if segment_ids is None else jnp.where(mask, segment_ids, 0)
    k, num_slots = routing.budget(mask, segment_ids, reduction)
    ends, slots = jnp.cumsum(k, axis=-1), jnp.arange(num_slots)
    segments = 1 + (ends[:, :, None] <= slots).sum(1)
    return jnp.where(slots < ends[:, -1:], segments, 0)
