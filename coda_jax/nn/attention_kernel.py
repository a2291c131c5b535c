"""softmax(q k^T + bias) v for CUDA GPUs, without an array of all queries and keys.

A block of queries goes through the keys in blocks, with a running maximum and a running sum of the
softmax (Dao et al. 2022, FlashAttention; Milakov & Gimelshein 2018). The bias is read by distance,
as T5's is made, so that it is no array of all pairs either.

Axis letters: B batch, Q queries, L keys, H heads, J = H head_dim, R distances.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.nn.position_bias import PositionBias
from coda_jax.nn.visibility import Visibility

# Queries and keys of a block, warps and stages: the fastest of ten on an H100, from 171 to 4,096
# keys.
_BLOCK = 64
_WARPS, _STAGES = 4, 2
MASKED_LOGIT = -1e10  # of a key that is not seen
_LOG2_E = math.log2(math.e)


def takes(query: Array, bias: Any, mask: Array | Visibility | None) -> bool:
    """Whether the kernel does what `attend` is asked for; query is [B, H, Q, head_dim]."""
    return (
        query.dtype == jnp.bfloat16
        and query.shape[-1] in (32, 64, 128)
        and (bias is None or (isinstance(bias, PositionBias) and not bias.prefix))
        and (mask is None or _of_keys_alone(mask))
    )


def _of_keys_alone(mask):
    if isinstance(mask, Visibility):
        return mask.same_for_all_queries
    return mask.shape[1:3] == (1, 1)


def attend(
    query: Float[Array, "b q j"],
    key: Float[Array, "b l j"],
    value: Float[Array, "b l j"],
    mask: Bool[Array, "b l"],
    by_distance: Float[Array, "h r"] | None = None,
    query_positions: Int[Array, "#b q"] | None = None,
    key_positions: Int[Array, "#b l"] | None = None,
    *,
    num_heads: int,
    interpret: bool = False,
) -> tuple[Float[Array, "b q j"]]:
    """softmax(q k^T + bias) v over the keys that the mask allows, in blocks.

    Args:
        query: [B, Q, J], the heads one behind the other.
        key: [B, L, J].
        value: [B, L, J].
        mask: [B, L]. A row that may see no key gets the mean of the values.
        by_distance: [H, R], the bias of each distance, key - query, from -(R - 1) / 2 to
            (R - 1) / 2; what is farther away has that of the last. None for no bias.
        query_positions: [B or 1, Q], with a bias.
        key_positions: [B or 1, L], with a bias.
        num_heads: H.
        interpret: whether to run the kernel step by step, on any platform.
    """
    # Imported here: only GPUs need it, and it is slow to import.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, num_queries, width = query.shape
    head_dim, num_keys = width // num_heads, key.shape[1]

    def of_head(length):
        return pl.BlockSpec((None, length, head_dim), lambda b, h, i: (b, 0, h))

    def of_row(x):
        shared = x.shape[0] == 1
        return pl.BlockSpec((None, x.shape[1]), lambda b, h, i: (0 if shared else b, 0))

    arrays = [query, key, value, mask.astype(jnp.int32)]
    specs = [of_head(num_queries), of_head(num_keys), of_head(num_keys), of_row(mask)]
    if by_distance is not None:
        arrays += [by_distance.astype(jnp.float32), query_positions, key_positions]
        specs.append(pl.BlockSpec((None, by_distance.shape[1]), lambda b, h, i: (h, 0)))
        specs += [of_row(query_positions), of_row(key_positions)]
    call = pl.pallas_call(
        functools.partial(_attend_block, pl=pl, triton=triton),
        grid=(rows, num_heads, pl.cdiv(num_queries, _BLOCK)),
        in_specs=specs,
        out_specs=of_head(num_queries),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="attention",
    )
    return (call(*arrays),)


def _attend_block(query, key, value, mask, *refs, pl, triton):
    """One block of queries of one head."""
    *bias, out = refs
    (num_queries, head_dim), num_keys = query.shape, key.shape[0]
    start = pl.program_id(2) * _BLOCK
    rows = start + jnp.arange(_BLOCK)

    def load(ref, start, inside):
        inside = jnp.broadcast_to(inside[:, None], (_BLOCK, head_dim))
        return triton.load(ref.at[pl.ds(start, _BLOCK), :], mask=inside, other=0.0)

    def load_row(ref, start, inside):
        return triton.load(ref.at[pl.ds(start, _BLOCK)], mask=inside, other=0)

    q = load(query, start, rows < num_queries)
    positions = load_row(bias[1], start, rows < num_queries) if bias else None

    def attend_to(block, carry):
        sums, highest, total = carry
        columns = block * _BLOCK + jnp.arange(_BLOCK)
        inside = columns < num_keys
        logits = triton.dot(q, load(key, block * _BLOCK, inside).T)
        if bias:
            # To skip the look-up where all keys are far off gave wrong sums on an H100.
            distance = load_row(bias[2], block * _BLOCK, inside)[None, :] - positions[:, None]
            limit = (bias[0].shape[0] - 1) // 2
            logits += triton.load(bias[0].at[jnp.clip(distance, -limit, limit) + limit])
        seen = load_row(mask, block * _BLOCK, inside) > 0
        # In powers of 2, of which the card has an instruction.
        logits = jnp.where(seen, logits, MASKED_LOGIT) * _LOG2_E
        logits = jnp.where(inside, logits, -jnp.inf)
        higher = jnp.maximum(highest, logits.max(-1))
        exponentials, shrunk = jnp.exp2(logits - higher[:, None]), jnp.exp2(highest - higher)
        v = load(value, block * _BLOCK, inside)
        sums = sums * shrunk[:, None] + triton.dot(exponentials.astype(v.dtype), v)
        return sums, higher, total * shrunk + exponentials.sum(-1)

    nothing = jnp.zeros((_BLOCK, head_dim), jnp.float32), jnp.full(_BLOCK, -jnp.inf)
    carry = *nothing, jnp.zeros(_BLOCK, jnp.float32)
    sums, _, total = lax.fori_loop(0, pl.cdiv(num_keys, _BLOCK), attend_to, carry)
    triton.store(
        out.at[pl.ds(start, _BLOCK), :],
        (sums / total[:, None]).astype(out.dtype),
        mask=jnp.broadcast_to((rows < num_queries)[:, None], (_BLOCK, head_dim)),
    )
