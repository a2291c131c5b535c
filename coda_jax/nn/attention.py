"""Attention and what biases it: relative positions, the cache of a decoder.

Axis letters: B batch, N tokens (Q queries, L keys), D embedding, H heads, R distances.
"""

from collections.abc import Callable
import functools

from flax import linen as nn
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from coda_jax.nn import processors
from coda_jax.nn.layers import Dense, Dtype, Vectors
from coda_jax.sharding import num_parts

_MASKED_LOGIT = -1e10
# From this many keys on XLA has a kernel for softmax and average on TPUs, if they fill its tiles.
_FUSED_LENGTH = 512
_TILE = 128
# Queries of all heads up to which a TPU's matrix unit is not full.
_FEW_QUERIES = 128
# Logits that a CPU keeps in its caches, about.
_CACHED_LOGITS = 2**18
_fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def relative_position_bucket(
    distance: np.ndarray, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """T5's bucket of each distance (key position - query position), as static numpy arithmetic.

    Half of the buckets hold one distance each, the other half grow in logarithmic steps up to
    `max_distance`, beyond which all share the last.
    """
    bucket = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += np.where(distance > 0, num_buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    max_exact = num_buckets // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / max_exact)
    ratio = ratio / np.float32(np.log(max_distance / max_exact))
    large = max_exact + (ratio * (num_buckets - max_exact)).astype(distance.dtype)
    return bucket + np.where(distance < max_exact, distance, np.minimum(large, num_buckets - 1))


class RelativePositionBiases(nn.Module):
    """T5's relative position bias, computed from the positions of the queries and the keys.

    Attributes:
        num_buckets: number of learned values per head.
        max_distance: all distances from here on share one bucket.
        num_heads: H.
        bidirectional: whether keys after the query have buckets of their own.
        dtype: of the result.
    """

    num_buckets: int
    max_distance: int
    num_heads: int
    bidirectional: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, query_positions: Int[Array, "#b q"], key_positions: Int[Array, "#b l"]
    ) -> Float[Array, "b h q l"]:
        """The bias of each query and key, [B, H, Q, L]."""
        rel_embedding = partitioning.param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (self.num_heads, self.num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        # Distances are few and buckets static: one value per head and distance.
        limit = self.max_distance
        buckets = relative_position_bucket(
            np.arange(-limit, limit + 1), self.bidirectional, self.num_buckets, limit
        )
        distance = key_positions[:, None, :] - query_positions[:, :, None]
        return lax.platform_dependent(
            rel_embedding.astype(self.dtype),
            jnp.clip(distance, -limit, limit) + limit,
            tpu=functools.partial(_bias_selected, buckets=buckets),
            default=functools.partial(_bias_looked_up, buckets=buckets),
        )


def _bias_looked_up(values, distance, *, buckets):
    return jnp.moveaxis(jnp.take(values[:, buckets], distance, axis=1), 0, 1)


def _bias_selected(values, distance, *, buckets):
    """By a tree of selects on the bits of the rank of the distance's bucket: TPUs gather slowly."""
    edges = np.flatnonzero(np.diff(buckets)) + 1
    rank = sum((distance >= edge).astype(jnp.int32) for edge in edges)[:, None]
    starts = buckets[np.concatenate([[0], edges])]
    level = [values[None, :, i, None, None] for i in starts]
    bit = 0
    while len(level) > 1:
        one = ((rank >> bit) & 1) != 0
        level = [
            jnp.where(one, *reversed(level[i : i + 2])) if i + 1 < len(level) else level[i]
            for i in range(0, len(level), 2)
        ]
        bit += 1
    return level[0]


def attend(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    *,
    float32_logits: bool = False,
    dropout: Callable[[Array], Array] | None = None,
    source: tuple[Array, Array, Array] | None = None,
) -> Float[Array, "b h q k"]:
    """softmax(q k^T + bias) v over the keys that the mask allows; T5 does not scale the logits.

    Args:
        query: [B, H, Q, head_dim].
        key: [B, H, L, head_dim].
        value: [B, H, L, head_dim].
        bias: broadcasts to [B, H, Q, L].
        mask: broadcasts to [B, H, Q, L]. A query that may see no key gets the mean of the values.
        float32_logits: whether logits and softmax are float32 where the computation is not.
        dropout: applied to the attention weights, if there is any.
        source: what keys and values are products of, if it is at hand: x [B, L, D] and the matrices
            of `Attention.matrices`.
    """
    arguments = query, key, value, bias, mask
    options = {"float32_logits": float32_logits}
    if dropout is not None:
        return _attend(*arguments, **options, dropout=dropout)
    default = functools.partial(_attend, **options)
    cpu = tpu = default
    num_groups = num_parts("heads", query.shape[1])
    few = query.shape[1] // num_groups * query.shape[2] <= _FEW_QUERIES
    in_one_product = functools.partial(_attend_with_few_queries, num_groups, **options)
    in_blocks = functools.partial(_attend_in_blocks, float32_logits)
    if key.dtype == jnp.bfloat16:
        if processors.multiplies_bfloat16():
            cpu = in_one_product if few else in_blocks
    elif num_groups == 1 and query.shape[0] * query.shape[2] * key.shape[2] > _CACHED_LOGITS:
        cpu = in_blocks
    if few:
        tpu = in_one_product
        if source is not None:
            return lax.platform_dependent(
                arguments,
                source,
                tpu=functools.partial(_attend_to_source, **options),
                cpu=lambda arguments, source: cpu(*arguments),
                default=lambda arguments, source: default(*arguments),
            )
    elif key.shape[2] < _FUSED_LENGTH or key.shape[2] % _TILE:
        tpu = functools.partial(_attend, **options, average=_average_with_sum)
    return lax.platform_dependent(*arguments, cpu=cpu, tpu=tpu, default=default)


def _average(logits, value, dropout):
    weights = jax.nn.softmax(logits).astype(value.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum("bhql,bhld->bhqd", weights, value)


def _attend(query, key, value, bias, mask, *, float32_logits, dropout=None, average=_average):
    if float32_logits:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = _biased(jnp.einsum("bhqd,bhld->bhql", query, key), bias, mask)
    return average(logits, value, dropout)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_in_blocks(float32_logits, query, key, value, bias, mask):
    """Head by head, a block of queries at a time, so that the logits stay in a CPU's caches.

    Logits and softmax are float32. Its derivative is that of `_attend`: the loop's is slower.
    """
    del float32_logits  # of `_attend`, whose derivative is taken
    rows, heads, length, _ = query.shape
    blocks = -(-length // max(1, _CACHED_LOGITS // (rows * key.shape[2])))
    size = -(-length // blocks)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend_block(place):
        head, block = place

        def part(x, of_queries=True):
            if x is None:
                return None
            x = lax.dynamic_index_in_dim(x, head if x.shape[1] > 1 else 0, 1, keepdims=False)
            if not of_queries or x.shape[1] == 1:
                return x
            # A slice that would end behind the last query starts earlier.
            return lax.dynamic_slice_in_dim(x, block * size, size, 1)

        logits = product("bqd,bld->bql", part(query), part(key, of_queries=False))
        logits = _biased(logits, part(bias), part(mask))
        exponentials = jnp.exp(logits - logits.max(-1, keepdims=True))
        # The average is divided by the weights' sum, and not the weights: it has fewer columns.
        weights = exponentials.astype(value.dtype)
        sums = product("bql,bld->bqd", weights, part(value, of_queries=False))
        return (sums / exponentials.sum(-1, keepdims=True)).astype(value.dtype)

    places = jnp.unravel_index(jnp.arange(heads * blocks), (heads, blocks))
    y = lax.map(attend_block, places).reshape(heads, blocks, rows, size, -1)
    y = y.transpose(2, 0, 1, 3, 4)
    last = length - (blocks - 1) * size
    whole = y[:, :, :-1].reshape(rows, heads, length - last, value.shape[-1])
    return jnp.concatenate([whole, y[:, :, -1, size - last :]], axis=2)


@_attend_in_blocks.defjvp
def _attend_in_blocks_jvp(float32_logits, primals, tangents):
    return jax.jvp(functools.partial(_attend, float32_logits=float32_logits), primals, tangents)


def _biased(logits, bias, mask):
    if bias is not None:
        logits += bias.astype(logits.dtype)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.asarray(_MASKED_LOGIT, logits.dtype))
    return logits


def _attend_with_few_queries(num_groups, query, key, value, bias, mask, *, float32_logits):
    """One product for all heads of a group: their queries stand on the diagonal of [H, H head_dim].

    For a decoding step, which waits for keys and values: [L, head_dim] for each head fills half of
    a TPU's tiles, [L, H head_dim] all of them. Heads of different chips are in different groups, or
    else their logits would be added up over the chips.
    """
    num_heads, head_dim = query.shape[1] // num_groups, query.shape[3]
    diagonal = jnp.repeat(jnp.eye(num_heads, dtype=bool), head_dim, axis=1)

    def joined(x):
        return join_heads(x).reshape(x.shape[0], x.shape[2], num_groups, -1)

    rows, float32 = jnp.where(diagonal, joined(query)[..., None, :], 0), jnp.float32
    logits = jnp.einsum("bqghj,blgj->bghql", rows, joined(key), preferred_element_type=float32)
    logits = logits.reshape(query.shape[0], -1, *logits.shape[3:])
    if not float32_logits:
        logits = logits.astype(query.dtype)
    weights = jax.nn.softmax(_biased(logits, bias, mask)).astype(value.dtype)
    weights = weights.reshape(query.shape[0], num_groups, -1, key.shape[2])
    y = jnp.einsum("bgml,blgj->bgmj", weights, joined(value), preferred_element_type=float32)
    y = y.reshape(*y.shape[:2], num_heads, -1, y.shape[-1])
    y = jnp.where(diagonal[:, None], y, 0).sum(2).astype(value.dtype)
    return jnp.swapaxes(y.reshape(*y.shape[:3], num_heads, head_dim), 2, 3).reshape(query.shape)


def _attend_to_source(arguments, source, *, float32_logits):
    """Without keys and values: q (x W)^T = (q W^T) x^T, and w (x W) = (w x) W.

    For a decoding step, which waits for what it reads: x is the same for all layers, for keys and
    for values.
    """
    query, _, _, bias, mask = arguments
    x, key_matrix, value_matrix = source
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    rows = product("bhqk,dhk->bhqd", query, key_matrix).astype(x.dtype)
    logits = product("bhqd,bld->bhql", rows, x)
    if not float32_logits:
        logits = logits.astype(x.dtype)
    weights = jax.nn.softmax(_biased(logits, bias, mask)).astype(x.dtype)
    means = product("bhql,bld->bhqd", weights, x).astype(x.dtype)
    return product("bhqd,dhk->bhqk", means, value_matrix).astype(x.dtype)


def _average_with_sum(logits, value, dropout):
    """With the softmax's denominator as one more column of the values, which a TPU has room for."""
    del dropout
    highest = lax.stop_gradient(logits.max(-1, keepdims=True))
    exponentials = jnp.exp((logits - highest).astype(jnp.float32)).astype(value.dtype)
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    sums = jnp.einsum(
        "bhql,bhld->bhqd",
        exponentials,
        jnp.concatenate([value, ones], axis=-1),
        preferred_element_type=jnp.float32,
    )
    return (sums[..., :-1] / sums[..., -1:]).astype(value.dtype)


def split_heads(x: Float[Array, "b n j"], num_heads: int) -> Float[Array, "b h n k"]:
    """[B, N, H * head_dim] -> [B, H, N, head_dim], as the matrix products want it."""
    x = x.reshape(*x.shape[:-1], num_heads, -1)
    x = partitioning.with_sharding_constraint(x, ("batch", "length", "heads", "kv"))
    return jnp.swapaxes(x, 1, 2)


def join_heads(x: Float[Array, "b h n k"]) -> Float[Array, "b n j"]:
    """The inverse of `split_heads`."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(*x.shape[:-2], -1)


class Attention(nn.Module):
    """Multi-head attention without biases; keys and values may be made once and used often.

    Attributes:
        num_heads: H.
        head_dim: of each head.
        dropout_rate: on the attention weights.
        float32_logits: whether logits and softmax are float32 where `dtype` is not.
        dtype: of the computation.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    float32_logits: bool = False
    dtype: Dtype = jnp.float32

    def setup(self):
        def project(init):
            return Dense(
                self.num_heads * self.head_dim,
                ("embed", "joined_kv"),
                init,
                dtype=self.dtype,
                output_heads=self.num_heads,
            )

        # T5 folds the 1 / sqrt(head_dim) of the logits into the start of the query projection.
        self.query = project(lambda *args: _fan_in_normal(*args) * self.head_dim**-0.5)
        self.key = project(_fan_in_normal)
        self.value = project(_fan_in_normal)
        self.dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

    def keys_values(self, x: Vectors) -> tuple[Float[Array, "b h l k"], Float[Array, "b h l k"]]:
        """The keys and values of x, each [B, H, L, head_dim]."""
        return tuple(split_heads(y, self.num_heads) for y in (self.key(x), self.value(x)))

    def matrices(self, width: int) -> tuple[Float[Array, "d h k"], Float[Array, "d h k"]]:
        """What keys and values are products of x [..., width] with, each [D, H, head_dim]."""
        identity = jnp.eye(width, dtype=self.dtype)
        return tuple(
            y(identity).reshape(width, self.num_heads, self.head_dim)
            for y in (self.key, self.value)
        )

    @nn.compact
    def __call__(
        self,
        x_q: Vectors,
        keys_values: tuple[Float[Array, "c h l k"], Float[Array, "c h l k"]],
        mask: Bool[Array, "..."] | None = None,
        bias: Float[Array, "..."] | None = None,
        *,
        source: tuple[Array, Array, Array] | None = None,
        deterministic: bool,
    ) -> Float[Array, "b q d"]:
        """Attends from x_q to keys and values that `keys_values` made.

        The keys may have fewer rows than the queries, [C, ...] with B = C * beams: the beams of a
        row then share its keys, and mask is that of the C rows. For source see `attend`.
        """
        key, value = keys_values
        query, dropout = self.query(x_q), None
        if self.dropout_rate and not deterministic:
            dropout = functools.partial(self.dropout, deterministic=False)
        y = attend(
            split_heads(query.reshape(key.shape[0], -1, query.shape[-1]), self.num_heads),
            key,
            value,
            bias,
            mask,
            float32_logits=self.float32_logits,
            dropout=dropout,
            source=source,
        )
        return Dense(
            x_q.shape[-1],
            ("joined_kv", "embed"),
            _fan_in_normal,
            dtype=self.dtype,
            input_heads=self.num_heads,
            name="out",
        )(join_heads(y).reshape(query.shape))


class KeyValueCache(nn.Module):
    """The keys and values of the tokens decoded so far.

    The first call, with arrays of the full length, makes an empty cache and returns its input.
    Each later call brings one position, which is written at the index.
    """

    @nn.compact
    def __call__(
        self, key: Float[Array, "b h n k"], value: Float[Array, "b h n k"]
    ) -> tuple[Float[Array, "b h l k"], Float[Array, "b h l k"], Int[Array, "1 q"]]:
        """(keys, values [B, H, L, head_dim], positions of the queries [1, Q])."""
        exists = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros_like, key)
        cached_value = self.variable("cache", "cached_value", jnp.zeros_like, value)
        index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        if not exists:
            return key, value, jnp.arange(key.shape[2], dtype=jnp.int32)[None]
        if key.shape[2] != 1:
            raise ValueError(f"cached decoding takes one token a step, got {key.shape[2]}")
        start = (0, 0, index.value, 0)
        cached_key.value = lax.dynamic_update_slice(cached_key.value, key, start)
        cached_value.value = lax.dynamic_update_slice(cached_value.value, value, start)
        position = index.value[None, None]
        index.value += 1
        return cached_key.value, cached_value.value, position
