"""Products with matrices of zeros and ones, for TPUs, which gather, scatter and loop slowly.

Axis letters: M sums, N values, B batch, K slots, D embedding.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

_TILE = 128  # of a TPU's matrix unit


def chosen_sums(
    chosen: Bool[Array, "*batch m n"], values: Float[Array, "*batch n"]
) -> Float[Array, "*batch m"]:
    """For each m the sum of the values that are chosen; of one value, that value to the last bit.

    Args:
        chosen: [..., M, N].
        values: [..., N] float32, 0 or from 2^-100 to 2^100 in size.

    Returns:
        [..., M] float32.
    """
    return _sums(chosen, values)


@jax.custom_vjp
def _sums(chosen, values):
    sums = jnp.einsum(
        "...mn,...nc->...mc",
        chosen.astype(jnp.bfloat16),
        jnp.stack(parts(values), axis=-1),
        preferred_element_type=jnp.float32,
    )
    return (sums[..., 2] + sums[..., 1]) + sums[..., 0]


def _sums_fwd(chosen, values):
    return _sums(chosen, values), chosen


def _sums_bwd(chosen, cotangent):
    return None, _sums(jnp.swapaxes(chosen, -1, -2), cotangent)


_sums.defvjp(_sums_fwd, _sums_bwd)


def slots_hit(slots: Int[Array, "*batch n"], num_slots: int) -> Bool[Array, "*batch m n"]:
    """For each of so many slots, whether it is that of a place."""
    return slots[..., None, :] == jnp.arange(num_slots, dtype=jnp.int32)[:, None]


def places_and_values(
    slots: Int[Array, "*batch n"], values: Float[Array, "*batch n"], num_slots: int
) -> tuple[Int[Array, "*batch m"], Float[Array, "*batch m"]]:
    """The place of each slot, and its value to the last bit; 0 in slots without a place.

    Args:
        slots: [..., N], M for places without one; no slot has two places.
        values: [..., N] float32, as of `chosen_sums`.
        num_slots: M.
    """
    return _places_and_values(num_slots, slots, values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _places_and_values(num_slots, slots, values):
    length = slots.shape[-1]
    # Bytes are exact in bfloat16.
    bytes_ = range(0, max((length - 1).bit_length(), 1), 8)
    places = [np.arange(length) >> shift & 255 for shift in bytes_]
    columns = [jnp.broadcast_to(jnp.asarray(x, jnp.bfloat16), values.shape) for x in places]
    sums = jnp.einsum(
        "...mn,...nc->...mc",
        slots_hit(slots, num_slots).astype(jnp.bfloat16),
        jnp.stack([*columns, *parts(values)], axis=-1),
        preferred_element_type=jnp.float32,
    )
    found = sum(sums[..., i].astype(jnp.int32) << shift for i, shift in enumerate(bytes_))
    return found, (sums[..., -1] + sums[..., -2]) + sums[..., -3]


def _places_and_values_fwd(num_slots, slots, values):
    # The slots are kept for the gradient, not the M x N that they hit.
    return _places_and_values(num_slots, slots, values), slots


def _places_and_values_bwd(num_slots, slots, cotangents):
    hit = jnp.swapaxes(slots_hit(slots, num_slots), -1, -2)
    return None, _sums(hit, cotangents[1])


_places_and_values.defvjp(_places_and_values_fwd, _places_and_values_bwd)


def parts(values: Float[Array, "*shape"]) -> list[Float[Array, "*shape"]]:
    """Three bfloat16 arrays whose sum is a float32 array, which the matrix unit multiplies exactly.

    `reduce_precision`: a pair of conversions would be taken for excess and dropped.
    """
    found = []
    for _ in range(3):
        part = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        values = values - part
    return found


def running_count(keep: Bool[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """How many are kept up to each place and at it, as `cumsum`; a tile at a time."""
    length = keep.shape[-1]
    keep = jnp.pad(keep, [(0, 0)] * (keep.ndim - 1) + [(0, -length % _TILE)])
    tiles = keep.reshape(*keep.shape[:-1], -1, _TILE)
    upto = jnp.triu(jnp.ones((_TILE, _TILE), bool))
    within = _counts(tiles, upto)
    num_tiles = tiles.shape[-2]
    before = jnp.triu(jnp.ones((num_tiles, num_tiles), bool), 1)
    # A tile's count, at most 128, is exact in bfloat16.
    counts = within + _counts(within[..., -1], before)[..., None]
    return counts.reshape(keep.shape)[..., :length].astype(jnp.int32)


def _counts(values, chosen):
    return jnp.einsum(
        "...n,nm->...m",
        values.astype(jnp.bfloat16),
        chosen.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )


def add_rows(
    x: Float[Array, "b n d"],
    indices: Int[Array, "b k"],
    rows: Float[Array, "b k d"],
    factors: tuple[Float[Array, "b n a"], Float[Array, "a d"]] | None = None,
) -> Float[Array, "b n d"]:
    """x, each row added to that of its index, and the product of the factors, if there are any."""
    if factors is not None:
        # In one product: what takes long is to write all of x, not to multiply.
        left, right = factors
        indices = jnp.pad(indices, ((0, 0), (0, left.shape[-1])), constant_values=-1)
        right = jnp.broadcast_to(right, (rows.shape[0], *right.shape))
        rows = jnp.concatenate([rows, right.astype(rows.dtype)], axis=1)
    chosen = jnp.swapaxes(one_hot_rows(indices, x.shape[1]), 1, 2).astype(rows.dtype)
    if factors is not None:
        chosen += jnp.pad(left, ((0, 0), (0, 0), (chosen.shape[-1] - left.shape[-1], 0)))
    added = jnp.einsum(
        "bnk,bkd->bnd",
        chosen,
        rows,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (x.astype(jnp.float32) + added).astype(x.dtype)


def one_hot_rows(indices: Int[Array, "b k"], length: int) -> Bool[Array, "b k n"]:
    """True at each index."""
    return indices[..., None] == jnp.arange(length, dtype=jnp.int32)
