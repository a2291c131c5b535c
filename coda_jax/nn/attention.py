"""Attention, with the cache of a decoder or with relative keys.

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

from coda_jax.nn.layers import Dense, Dtype, Vectors

_MASKED_LOGIT = -1e10
# From this many keys on XLA has a kernel for the whole attention on TPUs, if written with softmax.
_FUSED_LENGTH = 512
# Queries of all heads up to which a TPU's matrix unit is not full.
_FEW_QUERIES = 128
# What keys and values are products of, and the matrices; see `attend`.
Source = tuple[Float[Array, "c l d"], Float[Array, "d h k"], Float[Array, "d h k"]]
_fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def attend(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    *,
    float32_logits: bool = False,
    dropout: Callable[[Array], Array] | None = None,
    source: Source | None = None,
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
    tpu = default
    if query.shape[1] * query.shape[2] <= _FEW_QUERIES:
        tpu = functools.partial(_attend_with_few_queries, **options)
        if source is not None:
            return lax.platform_dependent(
                arguments,
                source,
                tpu=functools.partial(_attend_to_source, **options),
                default=lambda arguments, source: default(*arguments),
            )
    elif key.shape[2] < _FUSED_LENGTH:
        tpu = functools.partial(_attend, **options, average=_average_with_sum)
    return lax.platform_dependent(*arguments, tpu=tpu, default=default)


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


def _biased(logits, bias, mask):
    if bias is not None:
        logits += bias.astype(logits.dtype)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.asarray(_MASKED_LOGIT, logits.dtype))
    return logits


def _attend_with_few_queries(query, key, value, bias, mask, *, float32_logits):
    """One product for all heads: their queries stand on the diagonal of [H, H head_dim].

    For a decoding step, which waits for keys and values: [L, head_dim] for each head fills half of
    a TPU's tiles, [L, H head_dim] all of them.
    """
    num_heads, head_dim = query.shape[1], query.shape[3]
    diagonal = jnp.repeat(jnp.eye(num_heads, dtype=bool), head_dim, axis=1)
    rows = jnp.where(diagonal, join_heads(query)[:, :, None], 0)
    logits = jnp.einsum("bqhj,blj->bhql", rows, join_heads(key), preferred_element_type=jnp.float32)
    if not float32_logits:
        logits = logits.astype(query.dtype)
    weights = jax.nn.softmax(_biased(logits, bias, mask)).astype(value.dtype)
    y = jnp.einsum(
        "bml,blj->bmj",
        weights.reshape(weights.shape[0], -1, weights.shape[-1]),
        join_heads(value),
        preferred_element_type=jnp.float32,
    )
    y = y.reshape(*weights.shape[:3], -1)
    y = jnp.where(diagonal[:, None], y, 0).sum(1).astype(value.dtype)
    return split_heads(y, num_heads)


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
        source: Source | None = None,
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


class RelativeKeyAttention(nn.Module):
    """softmax((q k^T + q E[distance]^T) / sqrt(head_dim)) v, with a learned vector per distance.

    Attributes:
        num_heads: H.
        head_dim: of each head.
        max_left: keys that lie further before the query share a vector.
        max_right: keys that lie further behind it share a vector.
        dropout_rate: on the attention weights.
        float32_logits: whether logits and softmax are float32 where `dtype` is not.
        dtype: of the computation.

    Reference: Shaw et al. 2018, Self-Attention with Relative Position Representations.
    """

    num_heads: int
    head_dim: int
    max_left: int
    max_right: int
    dropout_rate: float = 0.0
    float32_logits: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_q: Float[Array, "b q d"],
        x_kv: Float[Array, "b l d"],
        mask: Bool[Array, "b 1 #q l"],
        query_positions: Int[Array, "_ q"],
        key_positions: Int[Array, "_ l"],
        *,
        deterministic: bool,
    ) -> Float[Array, "b q d"]:
        """Attends from x_q to x_kv where the mask allows; positions are in time."""

        def heads(name, x):
            width = self.num_heads * self.head_dim
            x = Dense(width, ("embed", "joined_kv"), use_bias=True, dtype=self.dtype, name=name)(x)
            return split_heads(x, self.num_heads)

        query = heads("query", x_q) * self.head_dim**-0.5
        dropout = None
        if self.dropout_rate and not deterministic:
            dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,), deterministic=False)
        y = attend(
            query,
            heads("key", x_kv),
            heads("value", x_kv),
            self._position_term(query, query_positions, key_positions),
            mask,
            float32_logits=self.float32_logits,
            dropout=dropout,
        )
        return Dense(
            x_q.shape[-1], ("joined_kv", "embed"), use_bias=True, dtype=self.dtype, name="out"
        )(join_heads(y))

    def _position_term(self, query, query_positions, key_positions) -> Float[Array, "b h q l"]:
        embedding = partitioning.param_with_axes(
            "distance_embedding",
            nn.initializers.normal(1.0),
            (self.max_left + 1 + self.max_right, self.head_dim),
            jnp.float32,
            axes=("relpos_buckets", "kv"),
        )
        # Distances are few: one product per query and distance, then a look-up for each key.
        by_distance = jnp.einsum("bhqd,rd->bhqr", query, embedding.astype(self.dtype))
        distance = key_positions[:, None, :] - query_positions[:, :, None]
        distance = jnp.clip(distance, -self.max_left, self.max_right) + self.max_left
        return jnp.take_along_axis(
            by_distance, distance[:, None], axis=-1, mode="promise_in_bounds"
        )
