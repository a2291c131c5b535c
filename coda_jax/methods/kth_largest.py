"""The k-th largest of scores, without sorting.

Axis letters: N tokens, `...` any batch axes.
"""

from functools import partial

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32
import numpy as np

_TOP_BIT = np.uint32(1 << 31)  # a float32's sign


def kth_largest(
    scores: Float[Array, "*batch n"],
    k: Int[Array, "*batch 1"],
    mask: Bool[Array, "*batch n"],
    by_counts: bool = False,
) -> Float[Array, "*batch 1"]:
    """The k-th largest of the unmasked scores.

    Args:
        scores: [..., N] float32.
        k: [..., 1]; 0 counts as 1.
        mask: [..., N]. Where fewer than k are unmasked, the result is meaningless.
        by_counts: as of `kth_key`.
    """
    found, _ = kth_key(scores, k, mask, by_counts)
    bits = jnp.where(found < _TOP_BIT, ~found, found ^ _TOP_BIT)
    return lax.bitcast_convert_type(bits, jnp.float32)


def kth_key(
    scores: Float[Array, "*batch n"],
    k: Int[Array, "*batch 1"],
    mask: Bool[Array, "*batch n"],
    by_counts: bool = False,
) -> tuple[UInt32[Array, "*batch 1"], UInt32[Array, "*batch n"]]:
    """The key of the k-th largest score, and all keys, as they came out of the search.

    A key is a float32 as a whole number that is ordered like it; a masked score's is 0.

    Args:
        scores: [..., N] float32.
        k: [..., 1]; 0 counts as 1.
        mask: [..., N].
        by_counts: whether to count digits by products, for TPUs.
    """
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    keys = jnp.where(mask, jnp.where(bits < _TOP_BIT, bits | _TOP_BIT, ~bits), 0)
    k = jnp.maximum(k, 1)
    return _by_counts(keys, k) if by_counts else _by_comparisons(keys, k)


def _by_comparisons(keys, k):
    """Two bits after the other: the largest such that at least k keys reach it."""
    digits = jnp.arange(1, 4, dtype=jnp.uint32)

    def add_digit(i, carry):
        found, keys = carry
        shift = jnp.uint32(30) - jnp.uint32(2) * jnp.asarray(i, jnp.uint32)
        candidates = found | (digits << shift)
        reached = (keys[..., None, :] >= candidates[..., :, None]).sum(-1)
        return found | ((reached >= k).sum(-1, keepdims=True, dtype=jnp.uint32) << shift), keys

    return lax.fori_loop(0, 16, add_digit, (jnp.zeros(k.shape, jnp.uint32), keys))


def _by_counts(keys, k):
    """A byte after the other: how many keys reach what is found with each of the 256 behind it.

    They are counted by products over the keys of one-hot rows, for the two halves of the byte.
    """
    halves = np.arange(16, dtype=np.uint32)
    bytes_ = np.arange(256).reshape(16, 16)
    count = partial(jnp.einsum, "...nh,...nl->...hl", preferred_element_type=jnp.float32)
    found, k = jnp.zeros(k.shape, jnp.uint32), k.astype(jnp.float32)[..., None]
    for shift in (24, 16, 8, 0):
        begun = (keys >> np.uint32(shift + 4))[..., None]
        candidates = (found << np.uint32(4) | halves)[..., None, :]
        low = ((keys >> np.uint32(shift)) & np.uint32(15))[..., None] >= halves
        equal, above = begun == candidates, begun > candidates
        # Counts of float32 are exact up to 2^24 keys.
        reaching = count(equal.astype(jnp.bfloat16), low.astype(jnp.bfloat16))
        reaching += count(above.astype(jnp.bfloat16), jnp.ones_like(above[..., :1], jnp.bfloat16))
        enough = (reaching >= k) & (bytes_ > 0)
        found = (found << np.uint32(8)) | enough.sum((-2, -1), dtype=jnp.uint32)[..., None]
    return found, keys
