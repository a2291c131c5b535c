"""Products with matrices of zeros and ones, for TPUs, which gather, scatter and loop slowly.

Axis letters: M sums, N values, B batch, K slots, D embedding.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
    x: Float[Array, "b n d"], indices: Int[Array, "b k"], rows: Float[Array, "b k d"]
) -> Float[Array, "b n d"]:
    """x, and each row added to that of its index."""
    one_hot = one_hot_rows(indices, x.shape[1])
    added = jnp.einsum(
        "bkn,bkd->bnd",
        one_hot.astype(rows.dtype),
        rows,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (x.astype(jnp.float32) + added).astype(x.dtype)


def one_hot_rows(indices: Int[Array, "b k"], length: int) -> Bool[Array, "b k n"]:
    """True at each index."""
    return indices[..., None] == jnp.arange(length, dtype=jnp.int32)
