"""Tokens on their way through a layer: what it knows of them, and a selection of some.

Axis letters: B batch, N tokens, K slots (the static capacity), n either, L keys, D embedding.
"""

from collections.abc import Mapping
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

POOLINGS = ("mean", "first")


@struct.dataclass
class Tokens:
    """What a layer knows of the tokens it works on (n is N for all of them, K for a selection).

    Attributes:
        x: [B, n, D] the residual stream.
        u: [B, n, D] the normalised residual stream, which layer, adapter and router read.
        positions: [B or 1, n] int32, each token's place in its row.
        mask: [B, n] bool, False for padding and for empty slots.
        segment_ids: [B, n] int, or None where rows are not packed.
    """

    x: Float[Array, "b n d"]
    u: Float[Array, "b n d"]
    positions: Int[Array, "_ n"]
    mask: Bool[Array, "b n"]
    segment_ids: Int[Array, "b n"] | None = None

    def visible(self, context: "Tokens") -> Bool[Array, "b 1 #n l"]:
        """Which tokens of a context these may attend to: no padding, and only their own segment."""
        visible = context.mask[:, None, None, :]
        if context.segment_ids is not None:
            same = self.segment_ids[:, :, None] == context.segment_ids[:, None, :]
            visible = visible & same[:, None]
        return visible


def take(values: Array, indices: Int[Array, "b k"]) -> Array:
    """values[b, indices[b, k]] for values [B, N, ...] and indices that are in bounds."""
    indices = indices.reshape(indices.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, indices, axis=1, mode="promise_in_bounds")


def pool(
    vectors: Float[Array, "b n d"], mask: Bool[Array, "b n"], pooling: str
) -> Float[Array, "b d"]:
    """One vector for a row, [B, D] float32: the mean of its tokens, or the first.

    Args:
        vectors: [B, N, D].
        mask: [B, N], False for padding; a row of padding alone has the mean 0.
        pooling: one of `POOLINGS`.
    """
    vectors = vectors.astype(jnp.float32)
    if pooling == "first":
        return vectors[:, 0]
    total = jnp.where(mask[..., None], vectors, 0).sum(1)
    return total / jnp.maximum(mask.sum(1, keepdims=True), 1)


@struct.dataclass
class Selection:
    """The tokens that a layer works on.

    Attributes:
        indices: [B, K] int32, strictly ascending in each row.
        weights: [B, K] float32, the token's routing weight; 0 in empty slots.
        valid: [B, K] bool, False in empty slots (a short example fills fewer than K).
    """

    indices: Int[Array, "b k"]
    weights: Float[Array, "b k"]
    valid: Bool[Array, "b k"]

    @jax.named_scope("gather")
    def gather(self, tokens: Tokens) -> Tokens:
        """The selected tokens, [B, N, ...] -> [B, K, ...]."""
        x, u = (take(values, self.indices) for values in (tokens.x, tokens.u))
        segment_ids = tokens.segment_ids
        if segment_ids is not None:
            segment_ids = take(segment_ids, self.indices)
        return Tokens(x, u, self.indices, self.valid, segment_ids)

    @jax.named_scope("scatter")
    def scatter_add(
        self, x: Float[Array, "b n d"], delta: Float[Array, "b k d"]
    ) -> Float[Array, "b n d"]:
        """x + scatter(weights * delta): each slot's weighted update goes to its token."""
        update = self.weights[..., None].astype(delta.dtype) * delta

        def add(row, indices, values):
            return row.at[indices].add(
                values, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
            )

        return jax.vmap(add)(x, self.indices, update)


def kept_first(keep: Bool[Array, "b n"], num_slots: int) -> Int[Array, "b k"]:
    """The places of what is kept, [B, K] int32, in ascending order; 0 in the slots left over."""
    places = jnp.broadcast_to(jnp.arange(keep.shape[1], dtype=jnp.int32), keep.shape)
    slots = jnp.where(keep, jnp.cumsum(keep, axis=-1) - 1, num_slots)

    def put(slots, places):
        return jnp.zeros(num_slots, jnp.int32).at[slots].set(places, mode="drop")

    return jax.vmap(put)(slots, places)


def join_frames(
    features: Float[Array, "b n f"], feature_mask: Bool[Array, "b n"]
) -> Float[Array, "b n c"]:
    """Frames as one array [B, N, 1 + F]: 1 for a frame or 0 for padding, then its features.

    Features do not say what is padding: those of silence are zero as well.
    """
    return jnp.concatenate([feature_mask[..., None].astype(features.dtype), features], axis=-1)


def split_frames(
    frames: Float[Array, "b n c"],
) -> tuple[Float[Array, "b n f"], Bool[Array, "b n"]]:
    """(features, feature_mask) of `join_frames`."""
    return frames[..., 1:], frames[..., 0] > 0


def selections(intermediates: Mapping[str, Any]) -> dict[str, Selection]:
    """{layer: its selection}, of the encoder's layers in which a module sowed one.

    Args:
        intermediates: what the network sowed.
    """
    return {
        name: module["selection"][0]
        for name, layer in intermediates.get("encoder", {}).items()
        for module in layer.values()
        if isinstance(module, Mapping) and "selection" in module
    }
