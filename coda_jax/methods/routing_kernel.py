"""CoDA's routing for CUDA GPUs: one program a row picks the tokens and weighs them.

The same steps as `selection.select` and `soft_topk.soft_topk`, where XLA makes some hundred small
programs of them, each of which takes longer to start than to run.

Axis letters: B batch, N tokens, K slots.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MOST_TOKENS = 8192  # that a program keeps in its registers
_WARPS, _MANY_WARPS = 4, 8  # up to 1,024 tokens, and for more
_LEAST = -(2**31)


def route(
    scores: Float[Array, "b n"],
    k: Int[Array, "b 1"],
    mask: Bool[Array, "b n"],
    *,
    num_slots: int,
    epsilon: float,
    interpret: bool = False,
) -> tuple[Int[Array, "b k"], Bool[Array, "b k"], Float[Array, "b k"]]:
    """The k largest scores in ascending position order, and their weights in the soft top-k.

    Args:
        scores: [B, N] float32, N at most `MOST_TOKENS`.
        k: [B, 1], at most the number of unmasked scores.
        mask: [B, N], False for tokens that must not be picked.
        num_slots: K, at least every k.
        epsilon: of the soft top-k.
        interpret: whether to run the kernel step by step, on any platform.

    Returns:
        indices [B, K] and valid [B, K] as of `selection.select`; weights [B, K], 0 in empty slots.
    """
    # Imported here: only GPUs need it, and it is slow to import.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, length = scores.shape
    padding = (0, 0), (0, pl.next_power_of_2(length) - length)
    arrays = jnp.pad(scores, padding), jnp.pad(mask, padding).astype(jnp.int32), k
    width = num_slots + 1  # what has no slot is written into one more

    def of_row(size):
        return pl.BlockSpec((None, size), lambda b: (b, 0))

    call = pl.pallas_call(
        functools.partial(_route_row, triton=triton, num_slots=num_slots, epsilon=epsilon),
        grid=(rows,),
        in_specs=[of_row(x.shape[1]) for x in arrays],
        out_specs=[of_row(width)] * 2,
        out_shape=[jax.ShapeDtypeStruct((rows, width), x) for x in (jnp.int32, jnp.float32)],
        compiler_params=triton.CompilerParams(
            num_warps=_WARPS if length <= 1024 else _MANY_WARPS, num_stages=1
        ),
        interpret=interpret,
        name="routing",
    )
    indices, weights = (x[:, :num_slots] for x in call(*arrays))
    empty = weights < 0  # which NaN is not
    return indices, ~empty, jnp.where(empty, 0, weights)


def _route_row(scores, mask, k, indices, weights, *, triton, num_slots, epsilon):
    scores, mask, k = scores[...], mask[...] > 0, k[0]
    picked, kth = _largest(scores, k, mask)
    z = jnp.where(mask, (scores - kth) / epsilon, -jnp.inf)
    # As in `selection.select`: the slots left over hold the first other tokens.
    count = jnp.cumsum(picked.astype(jnp.int32))
    places = jnp.arange(len(scores), dtype=jnp.int32)
    others, spare = places + 1 - count, num_slots - _count(picked)
    slots = count + jnp.minimum(others, spare) - 1
    slots = jnp.where(picked | (others <= spare), slots, num_slots)
    triton.store(indices.at[slots], places)
    # A negative weight marks an empty slot.
    triton.store(weights.at[slots], jnp.where(picked, _weights(z, k, mask), -1.0))


def _count(chosen):
    return chosen.astype(jnp.int32).sum()


def _largest(scores, k, mask):
    """Which are the k largest of the unmasked, of equal ones the earlier; and the k-th's score."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    # Whole numbers that are ordered like the scores.
    keys = jnp.where(mask, jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits), _LEAST)
    wanted = jnp.maximum(k, 1)

    def add_bit(i, found):
        candidate = found | (jnp.int32(1) << (30 - i))
        return jnp.where(_count(keys >= candidate) >= wanted, candidate, found)

    found = jnp.where(_count(keys >= 0) >= wanted, jnp.int32(0), jnp.int32(_LEAST))
    found = lax.fori_loop(0, 31, add_bit, found)
    above, ties = mask & (keys > found), mask & (keys == found)
    first = jnp.cumsum(ties.astype(jnp.int32)) <= k - _count(above)
    return above | (ties & first), jnp.where(ties, scores, -jnp.inf).max()


def _weights(z, k, mask):
    """min(1, exp(z + a)) with the sum k, by Newton's method as `soft_topk` does it."""
    exp_z, wanted = jnp.exp(z), k.astype(jnp.float32)

    def newton(_, a):
        saturated = z + a > 0
        free = jnp.where(saturated, 0.0, exp_z).sum()
        return jnp.minimum(jnp.log(jnp.maximum(wanted - _count(saturated), 1) / free), 0.0)

    start = -jnp.log((_count(mask) - k + 1).astype(jnp.float32))
    a = lax.fori_loop(0, 4 + len(z).bit_length() // 2, newton, start)
    saturated = mask & (z + a >= 0)
    weights = jnp.where(mask, jnp.exp(jnp.minimum(z + a, 0.0)), 0.0)
    free = jnp.where(saturated, 0.0, weights).sum()
    scale = (wanted - _count(saturated)) / jnp.where(free > 0, free, 1.0)
    return jnp.where(saturated, 1.0, jnp.minimum(weights * scale, 1.0))
