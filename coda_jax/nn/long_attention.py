"""softmax(q k^T + bias) v of long inputs, without an array of all queries and keys.

Blocks of queries go through the keys in blocks, with a running maximum and a running sum of the
softmax (Milakov & Gimelshein 2018); bias and mask are made for a block from the positions and
segments of its tokens. For the gradient each block's weights are computed again from the maximum
and the sum (Dao et al. 2022, FlashAttention), so that memory grows with the number of tokens, in
training as well.

Axis letters: B batch, H heads, Q queries, L keys, M or G of them in a block, W buckets.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.nn.attention_kernel import MASKED_LOGIT
from coda_jax.nn.position_bias import PositionBias
from coda_jax.nn.visibility import Visibility
from coda_jax.sharding import num_parts

# Pairs of a query and a key up to which the array of all of them is taken, which is faster: with
# 2,048 tokens it is.
_MOST_PAIRS = 2048**2
# The most keys, or queries, of a block; its logits for one head, which a CPU keeps in its caches;
# and for all, which a TPU keeps near its matrix unit.
_BLOCK = 1024
_LOGITS_OF_HEAD = 2**20
_LOGITS = 2**25
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def takes(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    bias: Any,
    mask: Any,
) -> bool:
    """Whether these are too long for an array, and neither bias nor mask is one already."""
    return (
        query.shape[2] * key.shape[2] > _MOST_PAIRS
        and (bias is None or isinstance(bias, PositionBias))
        and (mask is None or isinstance(mask, Visibility))
    )


def attend(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    bias: PositionBias | None,
    mask: Visibility | None,
) -> Float[Array, "b h q k"]:
    """softmax(q k^T + bias) v over the keys that the mask allows; logits are float32.

    Args:
        query: [B, H, Q, head_dim].
        key: [B, H, L, head_dim].
        value: [B, H, L, head_dim].
        bias: that of a distance, if there is any.
        mask: a query that may see no key gets the mean of the values.
    """
    divided = num_parts("batch", query.shape[0]) * num_parts("heads", query.shape[1]) > 1
    of_queries, of_keys = _of_tokens(key.shape[2], bias, mask)
    bias_of = None
    if bias is not None:
        bias_of = _Distances(bias.bidirectional, bias.max_distance)
    values = None if bias is None else bias.values
    return _attend((bias_of, divided), (query, key, value, values), (of_queries, of_keys))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, arrays, of_tokens):
    return _each_platform(static, _forward, arrays, of_tokens)[0]


def _attend_fwd(static, arrays, of_tokens):
    y, *statistics = _each_platform(static, _forward, arrays, of_tokens)
    return y, (arrays, of_tokens, y, statistics)


def _attend_bwd(static, saved, cotangent):
    (query, key, value, values), of_tokens, y, statistics = saved
    arrays = query, key, value, values, cotangent, y, *statistics
    found = _each_platform(static, _backward, arrays, of_tokens)
    of_values = None if values is None else found[3].sum(0).astype(values.dtype)
    return (*found[:3], of_values), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _each_platform(static, function, arrays, of_tokens):
    """A CPU takes one head of one row after the other, so that a block stays in its caches."""
    distances, divided = static
    together = functools.partial(function, distances, _LOGITS)
    of_head = functools.partial(function, distances, _LOGITS_OF_HEAD)
    one_by_one = functools.partial(_each_head, of_head)
    return lax.platform_dependent(
        arrays, of_tokens, cpu=together if divided else one_by_one, default=together
    )


def _each_head(function, arrays, of_tokens):
    """The results of a function of [1, 1, ...] for each row and head, as one [B, H, ...]."""
    rows, heads = arrays[0].shape[:2]

    def of_head(index):
        row, head = index // heads, index % heads
        query, key, value, values, *others = arrays
        values = None if values is None else values[head][None]
        given = [x[row, head][None, None] for x in (query, key, value, *others)]
        tokens = jax.tree.map(lambda x: x[row if x.shape[0] > 1 else 0][None], of_tokens)
        return function((*given[:3], values, *given[3:]), tokens)

    found = lax.map(of_head, jnp.arange(rows * heads, dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(rows, heads, *x.shape[3:]), found)


class _Distances(NamedTuple):
    """What is static of a `PositionBias`."""

    bidirectional: bool
    max_distance: int


class _Queries(NamedTuple):
    """What bias and mask are made of: for each query [B or 1, Q], or None."""

    positions: Int[Array, "#b q"] | None
    segments: Int[Array, "b q"] | None
    last: Int[Array, "#b q"] | None  # the position of the last key that it sees


class _Keys(NamedTuple):
    """Likewise for each key, [B or 1, L]."""

    positions: Int[Array, "#b l"] | None
    segments: Int[Array, "b l"] | None
    places: Int[Array, "#b l"] | None  # positions to be compared with `last` of a query
    seen: Bool[Array, "b l"] | None
    of_prefix: Bool[Array, "1 l"] | None  # without a bias, and seen by all
    inside: Bool[Array, "1 l"] | None = None  # False where a block is filled up


def _of_tokens(num_keys, bias, mask):
    def get(x, name):
        return None if x is None else getattr(x, name)

    def of_all_keys(x):
        # What comes before is of the prefix, and is not looked at.
        return x if x is None else jnp.pad(x, ((0, 0), (num_keys - x.shape[1], 0)), mode="edge")

    prefix = max(get(bias, "prefix") or 0, get(mask, "prefix") or 0)
    of_keys = [
        *[(bias, "key_positions"), (mask, "key_segments")],
        *[(mask, "key_positions"), (mask, "keys")],
    ]
    return (
        _Queries(
            get(bias, "query_positions"), get(mask, "query_segments"), get(mask, "query_positions")
        ),
        _Keys(
            *(of_all_keys(get(*each)) for each in of_keys),
            jnp.arange(num_keys)[None] < prefix if prefix else None,
        ),
    )


def _bias(distances, values, queries, keys):
    """[B or 1, H, M, G]; where all keys of a block are far away, nothing is looked up."""
    bias = PositionBias(values, queries.positions, keys.positions, *distances)
    shape = jax.eval_shape(bias.array).shape
    least = keys.positions.min() - queries.positions.max()
    most = keys.positions.max() - queries.positions.min()
    limit = distances.max_distance
    which = jnp.where(most <= -limit, 0, jnp.where(least >= limit, 2, 1))

    def of_far_keys(side):
        return lambda bias: jnp.broadcast_to(bias.of_far_keys()[side][:, None, None], shape)

    found = lax.switch(which, [of_far_keys(0), PositionBias.array, of_far_keys(1)], bias)
    if keys.of_prefix is not None:
        found = jnp.where(keys.of_prefix[:, None, None], 0, found)
    return found


def _seen(queries, keys):
    """[B, 1, M or 1, G], or None for all."""
    if keys.seen is None:
        return None
    seen = Visibility(keys.seen, queries.segments, keys.segments, queries.last, keys.places).array()
    return seen if keys.of_prefix is None else seen | keys.of_prefix[:, None, None]


def _logits(distances, query, key, values, queries, keys):
    """[B, H, M, G] float32."""
    logits = _product("bhqd,bhld->bhql", query, key)
    if values is not None:
        logits += _bias(distances, values, queries, keys)
    if (seen := _seen(queries, keys)) is not None:
        logits = jnp.where(seen, logits, MASKED_LOGIT)
    if keys.inside is not None:
        logits = jnp.where(keys.inside[:, None, None], logits, -jnp.inf)
    return logits


class _Blocks(NamedTuple):
    """An axis of tokens in blocks of one size, the last one filled up.

    Attributes:
        length: N, the tokens.
        number: of blocks.
        size: tokens of a block.
    """

    length: int
    number: int
    size: int

    @classmethod
    def of(cls, length, most):
        """As even as can be, each of `most` tokens or fewer."""
        number = -(-length // most)
        return cls(length, number, -(-length // number))

    def split(self, x, axis=2, mode="edge"):
        """[..., N, ...] -> [blocks, ..., tokens of a block, ...]."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = 0, self.number * self.size - self.length
        x = jnp.pad(x, widths, mode=mode)
        x = x.reshape(*x.shape[:axis], self.number, self.size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def split_all(self, tree):
        """The same of arrays [B or 1, N]."""
        return jax.tree.map(lambda x: self.split(x, axis=1), tree)

    def join(self, x):
        """[blocks, B, H, tokens of a block, ...] -> [B, H, N, ...]."""
        x = jnp.moveaxis(x, 0, 2)
        x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
        return lax.slice_in_dim(x, 0, self.length, axis=2)


def _blocks(arrays, of_keys, most_logits):
    """(blocks of queries, of keys; keys, values and what bias and mask are made of, in blocks)."""
    query, key, value, *_ = arrays
    keys = _Blocks.of(key.shape[2], _BLOCK)
    most = most_logits // (query.shape[0] * query.shape[1] * keys.size)
    most = min(1 << max(most.bit_length() - 1, 0), _BLOCK)  # whole tiles where lengths are
    inside = None
    if keys.number * keys.size > keys.length:
        inside = jnp.arange(keys.number * keys.size).reshape(keys.number, 1, -1) < keys.length
    of_keys = keys.split_all(of_keys)._replace(inside=inside)
    queries = _Blocks.of(query.shape[2], most)
    return queries, keys, (keys.split(key), keys.split(value), of_keys)


def _forward(distances, most_logits, arrays, of_tokens):
    """The averages [B, H, Q, head_dim], and of each query's logits the maximum and the sum."""
    query, _, value, values = arrays
    of_queries, of_keys = of_tokens
    queries_in, _, of_blocks = _blocks(arrays, of_keys, most_logits)

    def attend_block(block):
        q, queries = block

        def attend_to(carry, block):
            (k, v, keys), (sums, highest) = block, carry
            logits = _logits(distances, q, k, values, queries, keys)
            higher = jnp.maximum(highest, logits.max(-1))
            exponentials = jnp.exp(logits - higher[..., None]).astype(v.dtype)
            # The softmax's denominator is one more column of the values: TPUs add up slowly.
            v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)
            sums *= jnp.exp(highest - higher)[..., None]
            return (sums + _product("bhql,bhld->bhqd", exponentials, v), higher), None

        start = jnp.zeros((*q.shape[:-1], q.shape[-1] + 1), jnp.float32)
        start = start, jnp.full(q.shape[:-1], -jnp.inf)
        (sums, highest), _ = lax.scan(attend_to, start, of_blocks)
        total = sums[..., -1]
        # The average is divided by the weights' sum, and not the weights: it is smaller.
        return (sums[..., :-1] / total[..., None]).astype(value.dtype), highest, total

    found = lax.map(attend_block, (queries_in.split(query), queries_in.split_all(of_queries)))
    return tuple(queries_in.join(x) for x in found)


def _backward(distances, most_logits, arrays, of_tokens):
    """The cotangents of query, key and value, and of the bias of each row and bucket."""
    query, key, value, values, cotangent, y, highest, total = arrays
    of_queries, of_keys = of_tokens
    queries_in, keys_in, of_key_blocks = _blocks(arrays, of_keys, most_logits)
    # What a weight adds to all others' by being part of their sum.
    common = (cotangent.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1)

    def of_query_block(carry, block):
        q, of_y, common, highest, total, queries = block

        def of_key_block(carry, block):
            (of_q, of_values), (k, v, keys) = carry, block
            logits = _logits(distances, q, k, values, queries, keys)
            weights = jnp.exp(logits - highest[..., None]) / total[..., None]
            of_v = _product("bhql,bhqd->bhld", weights.astype(of_y.dtype), of_y)
            of_logits = _product("bhqd,bhld->bhql", of_y, v) - common[..., None]
            of_logits *= weights
            if (seen := _seen(queries, keys)) is not None:
                of_logits = jnp.where(seen, of_logits, 0)
            if values is not None:
                of_values += _of_values(distances, values, queries, keys, of_logits)
            of_logits = of_logits.astype(q.dtype)
            of_q += _product("bhql,bhld->bhqd", of_logits, k)
            return (of_q, of_values), (_product("bhql,bhqd->bhld", of_logits, q), of_v)

        of_k, of_v, of_values = carry
        start = jnp.zeros(q.shape, jnp.float32), of_values
        (of_q, of_values), more = lax.scan(of_key_block, start, of_key_blocks)
        return (of_k + more[0], of_v + more[1], of_values), of_q

    start = (
        *(jnp.zeros(x.shape, jnp.float32) for x in of_key_blocks[:2]),
        None if values is None else jnp.zeros(values.shape, jnp.float32),
    )
    (of_k, of_v, of_values), of_q = lax.scan(
        of_query_block,
        start,
        (
            queries_in.split(query),
            # Nothing comes from what fills a block.
            *(queries_in.split(x, mode="constant") for x in (cotangent, common)),
            *(queries_in.split(x) for x in (highest, total)),
            queries_in.split_all(of_queries),
        ),
    )
    if values is not None:  # as if the first row's: those of all rows are added up
        of_values = jnp.pad(of_values[None], ((0, query.shape[0] - 1), (0, 0), (0, 0)))
    return (
        queries_in.join(of_q).astype(query.dtype),
        keys_in.join(of_k).astype(key.dtype),
        keys_in.join(of_v).astype(value.dtype),
        of_values,
    )


def _of_values(distances, values, queries, keys, of_logits):
    def spread(values):
        bias = _bias(distances, values, queries, keys).astype(jnp.float32)
        return jnp.broadcast_to(bias, of_logits.shape)

    return jax.vjp(spread, values.astype(jnp.float32))[1](of_logits)[0]
