"""The parts of a Conformer layer that T5 does not have, with w2v-BERT 2.0's arithmetic.

Axis letters: B batch, N frames (Q queries, L keys), W width of the convolution, D embedding,
H heads, R distances.
"""

from flax import linen as nn
from flax.linen import partitioning
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax import layers
from coda_jax.layers import Dtype
from coda_jax.routing import kept_first, pick


class CenteredLayerNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) * scale + bias, in float32."""

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        def param(name, init):
            return partitioning.param_with_axes(
                name, init, (x.shape[-1],), jnp.float32, axes=("embed",)
            ).astype(jnp.float32)

        scale, bias = param("scale", nn.initializers.ones), param("bias", nn.initializers.zeros)
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= lax.rsqrt(jnp.mean(lax.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale + bias).astype(self.dtype)


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
            x = layers.Dense(
                width, ("embed", "joined_kv"), use_bias=True, dtype=self.dtype, name=name
            )(x)
            return layers.split_heads(x, self.num_heads)

        query = heads("query", x_q) * self.head_dim**-0.5
        dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,), deterministic=deterministic)
        y = layers.attend(
            query,
            heads("key", x_kv),
            heads("value", x_kv),
            self._position_term(query, query_positions, key_positions),
            mask,
            float32_logits=self.float32_logits,
            dropout=dropout,
        )
        return layers.Dense(
            x_q.shape[-1], ("joined_kv", "embed"), use_bias=True, dtype=self.dtype, name="out"
        )(layers.join_heads(y))

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


def causal_convolution(
    x: Float[Array, "b n d"],
    kernel: Float[Array, "w d"],
    segment_ids: Int[Array, "b n"] | None = None,
) -> Float[Array, "b n d"]:
    """y_t = sum_j kernel[W-1-j] * x_{t-j} for 0 <= j < W, per channel, within t's segment.

    Args:
        x: [B, N, D]; what is before its start counts as zero.
        kernel: [W, D].
        segment_ids: [B, N], or None where rows are not packed.

    Returns:
        [B, N, D].
    """
    width, length = kernel.shape[0], x.shape[1]
    y = jnp.zeros_like(x)
    # A sum of shifted copies is one fused loop; on a CPU XLA's convolution by channel takes more
    # than ten times as long (docs/performance.md).
    for lag in range(min(width, length)):
        shifted = _later(x, lag)
        if segment_ids is not None:
            same = _later(segment_ids, lag) == segment_ids
            shifted = jnp.where(same[..., None], shifted, 0)
        y += kernel[width - 1 - lag] * shifted
    return y


def _later(x: Array, lag: int) -> Array:
    """x, `lag` places later along its second axis, with zeros in front."""
    return jnp.pad(x, ((0, 0), (lag, 0)) + ((0, 0),) * (x.ndim - 2))[:, : x.shape[1]]


class Convolution(nn.Module):
    """Norm, gated projection, causal convolution by channel, norm, swish, projection.

    The convolution runs over the frames that are there, one after the other: padding and the empty
    slots of a selection take no place between them, wherever they stand. So what a frame gets
    depends neither on how far its row is padded nor on the capacity.

    Attributes:
        width: W, how many frames the convolution sees: a frame and the W - 1 before it.
        layer_norm_epsilon: of the norms.
        dtype: of the computation.
    """

    width: int
    layer_norm_epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b n"],
        segment_ids: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n d"]:
        def norm(name):
            return CenteredLayerNorm(self.layer_norm_epsilon, self.dtype, name=name)

        def project(name, factor, axes):
            return layers.Dense(factor * x.shape[-1], axes, dtype=self.dtype, name=name)

        kernel = partitioning.param_with_axes(
            "depthwise_kernel",
            nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=1),
            (self.width, x.shape[-1]),
            jnp.float32,
            axes=("length", "embed"),
        )
        y = jnp.where(mask[..., None], norm("layer_norm")(x), 0)
        y, gate = jnp.split(project("wi", 2, ("embed", "mlp"))(y), 2, axis=-1)
        y *= nn.sigmoid(gate)
        order = kept_first(mask, mask.shape[1])
        segments = None if segment_ids is None else pick(segment_ids, order)
        y = causal_convolution(pick(y, order), kernel.astype(self.dtype), segments)
        y = pick(y, jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0))  # back to their places
        return project("wo", 1, ("mlp", "embed"))(nn.swish(norm("depthwise_layer_norm")(y)))
