"""The parts of a T5 layer, with T5X's parameter names, axis names and arithmetic.

Axis letters: B batch, N tokens (Q queries, L keys), D embedding, H heads.
Parameters are float32 unless the caller holds them otherwise; `dtype` is that of the computation.
"""

from collections.abc import Callable, Sequence
import functools
import operator
from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

Dtype = Any
Initializer = Callable[..., Array]

_MASKED_LOGIT = -1e10
# Of `_blocked_product`, as measured: rows of a block, and the size of a result up to which it wins.
_BLOCK = 16
_BLOCKED_SIZE = 16384
_fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_fan_in_truncated_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def activation_function(name: str) -> Callable[[Array], Array]:
    """The function of that name in `flax.linen`, or the identity for "linear"."""
    if name == "linear":
        return lambda x: x
    if not callable(getattr(nn, name, None)):
        raise ValueError(f"unknown activation {name!r}: name a function of flax.linen or 'linear'")
    return getattr(nn, name)


class Dense(nn.Module):
    """x W, plus a bias if asked for. W is a matrix [inputs, outputs], also where it makes heads.

    Attributes:
        features: size of the last axis of the result.
        kernel_axes: logical names of the kernel's two axes.
        kernel_init: initializer of the kernel.
        dtype: of the computation.
        use_bias: whether there is a bias; T5 has none.
    """

    features: int
    kernel_axes: tuple[str, str]
    kernel_init: Initializer = _fan_in_truncated_normal
    dtype: Dtype = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... f"]:
        kernel = partitioning.param_with_axes(
            "kernel",
            self.kernel_init,
            (x.shape[-1], self.features),
            jnp.float32,
            axes=self.kernel_axes,
        )
        y = _product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            y += partitioning.param_with_axes(
                "bias",
                nn.initializers.zeros,
                (self.features,),
                jnp.float32,
                axes=self.kernel_axes[1:],
            ).astype(self.dtype)
        return y


def _product(x: Float[Array, "... d"], kernel: Float[Array, "d f"]) -> Float[Array, "... f"]:
    """x W; for the one token of a decoding step in whichever way the platform reads W fastest."""
    rows, (inputs, features) = x.size // x.shape[-1], kernel.shape
    one_token = x.ndim == 3 and x.shape[1] == 1
    if one_token and inputs % _BLOCK == 0 and 1 < rows <= _BLOCKED_SIZE // features:
        return lax.platform_dependent(x, kernel, cpu=_blocked_product, default=jnp.matmul)
    return x @ kernel


def _blocked_product(x, kernel):
    """x W as a sum over blocks of W's rows.

    XLA's CPU backend rearranges W before it multiplies, column by column: a few rows of x then wait
    for the memory. It reads small blocks in their order, up to twice as fast (docs/performance.md).
    """
    blocks = kernel.reshape(-1, _BLOCK, kernel.shape[1])
    x_blocks = x.reshape(*x.shape[:-1], -1, _BLOCK)
    parts = jnp.einsum("bqgk,gkf->gbqf", x_blocks, blocks, preferred_element_type=jnp.float32)
    return parts.sum(axis=0).astype(x.dtype)


class LayerNorm(nn.Module):
    """T5's layer norm, x / rms(x) * scale: no mean is subtracted and there is no bias."""

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = partitioning.param_with_axes(
            "scale", nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=("embed",)
        )
        x = x.astype(jnp.float32)
        x *= lax.rsqrt(jnp.mean(lax.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Embed(nn.Module):
    """Token embeddings, and their transpose as the output layer of tied models."""

    num_embeddings: int
    features: int
    dtype: Dtype = jnp.float32

    def setup(self):
        self.embedding = partitioning.param_with_axes(
            "embedding",
            nn.initializers.normal(1.0),
            (self.num_embeddings, self.features),
            jnp.float32,
            axes=("vocab", "embed"),
        )

    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        tokens = tokens.astype(jnp.int32)  # T5X makes the parameters with tokens of float32
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return partitioning.with_sharding_constraint(x, ("batch", "length", "embed"))

    def attend(self, x: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Logits x E^T in float32."""
        return x.astype(jnp.float32) @ self.embedding.astype(jnp.float32).T


class MlpBlock(nn.Module):
    """The feed-forward block: a product of activated projections, projected back.

    Attributes:
        intermediate_dim: width of the hidden layer.
        activations: one name per projection; ("relu",) for T5 1.0, ("gelu", "linear") for v1.1.
        dropout_rate: on the hidden layer.
        dtype: of the computation.
        use_bias: whether the projections have biases; T5's have none.
    """

    intermediate_dim: int
    activations: Sequence[str] = ("relu",)
    dropout_rate: float = 0.1
    dtype: Dtype = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], deterministic: bool) -> Float[Array, "b n d"]:
        dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)

        def hidden(name, activation):
            y = dense(self.intermediate_dim, ("embed", "mlp"), name=name)(x)
            return activation_function(activation)(y)

        names = ["wi"] if len(self.activations) == 1 else None
        names = names or [f"wi_{i}" for i in range(len(self.activations))]
        y = functools.reduce(operator.mul, map(hidden, names, self.activations))
        y = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(y, deterministic=deterministic)
        y = partitioning.with_sharding_constraint(y, ("batch", "length", "mlp"))
        return dense(x.shape[-1], ("mlp", "embed"), name="wo")(y)


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
        self, query_positions: Int[Array, "b q"], key_positions: Int[Array, "b l"]
    ) -> Float[Array, "b h q l"]:
        rel_embedding = partitioning.param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (self.num_heads, self.num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        # Distances are few and buckets static: one value per head and distance, then a look-up.
        limit = self.max_distance
        buckets = relative_position_bucket(
            np.arange(-limit, limit + 1), self.bidirectional, self.num_buckets, limit
        )
        by_distance = rel_embedding.astype(self.dtype)[:, buckets]
        distance = key_positions[:, None, :] - query_positions[:, :, None]
        distance = jnp.clip(distance, -limit, limit) + limit
        return jnp.moveaxis(jnp.take(by_distance, distance, axis=1), 0, 1)


def attend(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    *,
    float32_logits: bool = False,
    dropout: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "b h q k"]:
    """softmax(q k^T + bias) v over the keys that the mask allows; T5 does not scale the logits.

    Args:
        query: [B, H, Q, head_dim].
        key: [B, H, L, head_dim].
        value: [B, H, L, head_dim].
        bias: broadcasts to [B, H, Q, L].
        mask: broadcasts to [B, H, Q, L]. A query that may see no key gets the mean of the values.
        float32_logits: whether logits and softmax are float32 where the computation is not.
        dropout: applied to the attention weights.
    """
    dtype = query.dtype
    if float32_logits:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = jnp.einsum("bhqd,bhld->bhql", query, key)
    if bias is not None:
        logits += bias.astype(logits.dtype)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.asarray(_MASKED_LOGIT, logits.dtype))
    weights = dropout(jax.nn.softmax(logits).astype(dtype))
    return jnp.einsum("bhql,bhld->bhqd", weights, value)


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
    """Multi-head attention without biases, with a cache for decoding.

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
                self.num_heads * self.head_dim, ("embed", "joined_kv"), init, dtype=self.dtype
            )

        # T5 folds the 1 / sqrt(head_dim) of the logits into the start of the query projection.
        self.query = project(lambda *args: _fan_in_normal(*args) * self.head_dim**-0.5)
        self.key = project(_fan_in_normal)
        self.value = project(_fan_in_normal)
        self.dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

    def keys_values(
        self, x: Float[Array, "b l d"]
    ) -> tuple[Float[Array, "b h l k"], Float[Array, "b h l k"]]:
        """The keys and values of x, each [B, H, L, head_dim]."""
        return tuple(split_heads(y, self.num_heads) for y in (self.key(x), self.value(x)))

    @nn.compact
    def __call__(
        self,
        x_q: Float[Array, "b q d"],
        keys_values: tuple[Float[Array, "c h l k"], Float[Array, "c h l k"]],
        mask: Bool[Array, "..."] | None = None,
        bias: Float[Array, "..."] | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "b q d"]:
        """Attends from x_q to keys and values that `keys_values` made.

        The keys may have fewer rows than the queries, [C, ...] with B = C * beams: the beams of a
        row then share its keys, and mask is that of the C rows.
        """
        key, value = keys_values
        query = self.query(x_q)
        y = attend(
            split_heads(query.reshape(key.shape[0], -1, query.shape[-1]), self.num_heads),
            key,
            value,
            bias,
            mask,
            float32_logits=self.float32_logits,
            dropout=lambda weights: self.dropout(weights, deterministic=deterministic),
        )
        return Dense(
            x_q.shape[-1], ("joined_kv", "embed"), _fan_in_normal, dtype=self.dtype, name="out"
        )(join_heads(y).reshape(query.shape))
