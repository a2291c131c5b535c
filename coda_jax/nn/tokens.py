"""Tokens on their way through a layer: what it knows of them, and a selection of some.

Axis letters: B batch, N tokens, K slots (the static capacity), n either, L keys, D embedding.
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.nn import one_hot
from coda_jax.nn.layers import Normalized, Vectors
from coda_jax.nn.visibility import Visibility

POOLINGS = ("mean", "first")


@struct.dataclass
class Beside:
    """What stands beside a layer and sees every token: a product, to be added to what it returns.

    Attributes:
        array: [B, N, D] the product.
        left: [B, N, A], its factors, for platforms that multiply them together with others; None
            where that is of no use.
        right: [A, D] likewise.
    """

    array: Float[Array, "b n d"]
    left: Float[Array, "b n a"] | None = None
    right: Float[Array, "a d"] | None = None


@struct.dataclass
class Tokens:
    """What a layer knows of the tokens it works on (n is N for all of them, K for a selection).

    Attributes:
        x: [B, n, D] the residual stream.
        u: [B, n, D] the norm of x, which layer, adapter and router read.
        positions: [B or 1, n] int32, each token's place in its row.
        mask: [B, n] bool, False for padding and for empty slots.
        segment_ids: [B, n] int, or None where rows are not packed.
        selection: which of them the layer works on; None for all.
        beside: what `Selection.scatter_add` adds to all of them; None for nothing.
    """

    x: Float[Array, "b n d"]
    u: Vectors
    positions: Int[Array, "_ n"]
    mask: Bool[Array, "b n"]
    segment_ids: Int[Array, "b n"] | None = None
    selection: "Selection | None" = None
    beside: Beside | None = None

    def visible(self, context: "Tokens") -> Visibility:
        """Which tokens of a context these may attend to: no padding, and only their own segment."""
        if context.segment_ids is None:
            return Visibility(context.mask)
        return Visibility(context.mask, self.segment_ids, context.segment_ids)


def take(values: Array, indices: Int[Array, "b k"]) -> Array:
    """values[b, indices[b, k]] for values [B, N, ...] and indices that are in bounds."""
    tpu = _chosen_values if values.ndim == 2 else _chosen_rows
    return lax.platform_dependent(values, indices, tpu=tpu, default=_gathered)


def _gathered(values, indices):
    indices = indices.reshape(indices.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, indices, axis=1, mode="promise_in_bounds")


def _chosen_values(values, indices):
    chosen = one_hot.one_hot_rows(indices, values.shape[1])
    return one_hot.chosen_sums(chosen, values.astype(jnp.float32)).astype(values.dtype)


@jax.custom_vjp
def _chosen_rows(values, indices):
    """Rows are gathered, but their gradients are not scattered."""
    return _gathered(values, indices)


def _chosen_rows_fwd(values, indices):
    return _gathered(values, indices), (values, indices)


def _chosen_rows_bwd(saved, rows):
    values, indices = saved
    return one_hot.add_rows(jnp.zeros_like(values), indices, rows), None


_chosen_rows.defvjp(_chosen_rows_fwd, _chosen_rows_bwd)


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
        x, u = take(tokens.x, self.indices), tokens.u
        segment_ids = tokens.segment_ids
        if segment_ids is not None:
            segment_ids = take(segment_ids, self.indices)
        if isinstance(u, Normalized):
            inverse_rms = take(u.inverse_rms[..., 0], self.indices)
            u = u.replace(x=x.astype(u.x.dtype), inverse_rms=inverse_rms[..., None])
        else:
            u = take(u, self.indices)
        return Tokens(x, u, self.indices, self.valid, segment_ids)

    @jax.named_scope("scatter")
    def scatter_add(self, tokens: Tokens, delta: Float[Array, "b k d"]) -> Float[Array, "b n d"]:
        """x + scatter(weights * delta) + beside: each slot's weighted update goes to its token."""
        update = self.weights[..., None].astype(delta.dtype) * delta
        if tokens.beside is None or tokens.beside.left is None:
            y = _updated(tokens.x, self.indices, update)
            return y if tokens.beside is None else y + tokens.beside.array
        return _updated_beside(tokens.x, self.indices, update, tokens.beside)


def _updated(x, indices, update):
    return lax.platform_dependent(x, indices, update, tpu=one_hot.add_rows, default=_scattered)


@jax.custom_vjp
def _updated_beside(x, indices, update, beside):
    """In one product on TPUs, which write all tokens once. Differentiated as two sums."""

    def by_product(x, indices, update, beside):
        return one_hot.add_rows(x, indices, update, (beside.left, beside.right))

    def one_by_one(x, indices, update, beside):
        return _scattered(x, indices, update) + beside.array

    return lax.platform_dependent(x, indices, update, beside, tpu=by_product, default=one_by_one)


def _updated_beside_fwd(x, indices, update, beside):
    return _updated_beside(x, indices, update, beside), (indices, update[..., :0])


def _updated_beside_bwd(saved, cotangent):
    indices, of_type = saved
    zeros = jnp.zeros((*indices.shape, cotangent.shape[-1]), of_type.dtype)
    updated = functools.partial(_updated, jnp.zeros_like(cotangent), indices)
    (of_update,) = jax.vjp(updated, zeros)[1](cotangent)
    return cotangent, None, of_update, Beside(cotangent)


_updated_beside.defvjp(_updated_beside_fwd, _updated_beside_bwd)


def _scattered(x, indices, update):
    def add(row, indices, values):
        return row.at[indices].add(
            values, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
        )

    return jax.vmap(add)(x, indices, update)


def running_count(keep: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """How many are kept up to each place and at it, [B, N] int32."""
    return lax.platform_dependent(
        keep, tpu=one_hot.running_count, default=lambda keep: jnp.cumsum(keep, axis=-1)
    )


def kept_first(keep: Bool[Array, "b n"], num_slots: int) -> Int[Array, "b k"]:
    """The places of what is kept, [B, K] int32, in ascending order; 0 in the slots left over."""
    slots = jnp.where(keep, running_count(keep) - 1, num_slots)
    places = jnp.broadcast_to(jnp.arange(slots.shape[1], dtype=jnp.int32), slots.shape)

    def chosen(slots, places):
        hit = one_hot.slots_hit(slots, num_slots)
        return one_hot.chosen_sums(hit, places.astype(jnp.float32)).astype(jnp.int32)

    put = functools.partial(_put, num_slots)
    return lax.platform_dependent(slots, places, tpu=chosen, default=put)


def in_slots(
    slots: Int[Array, "b n"], values: Float[Array, "b n"], num_slots: int
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """(the place whose slot is k, its value), [B, K] each. Each slot has one place.

    Args:
        slots: [B, N], K for places without one.
        values: [B, N] float32, as of `one_hot.chosen_sums`.
        num_slots: K.
    """

    def chosen(slots, values):
        return one_hot.places_and_values(slots, values, num_slots)

    def taken(slots, values):
        places = jnp.broadcast_to(jnp.arange(slots.shape[1], dtype=jnp.int32), slots.shape)
        indices = _put(num_slots, slots, places)
        return indices, _gathered(values, indices)

    return lax.platform_dependent(slots, values, tpu=chosen, default=taken)


def _put(num_slots, slots, places):
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
