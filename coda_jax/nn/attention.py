"""Attention and what biases it: relative positions, the cache of a decoder.

Axis letters: B batch, N tokens (Q queries, L keys), D embedding, H heads, R distances.
"""

import functools

from flax import linen as nn
from flax.linen import partitioning
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from coda_jax.nn.dot_product_attention import attend, join_heads, split_heads
from coda_jax.nn.layers import Dense, Dtype, Vectors

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
        source: tuple[Float[Array, "c l d"], Float[Array, "d h k"], Float[Array, "d h k"]]
        | None = None,
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
