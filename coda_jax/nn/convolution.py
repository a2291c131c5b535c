"""Convolution over the tokens of a row, by channel, as in a Conformer.

Axis letters: B batch, N frames, W width of the convolution, D embedding.
"""

from flax import linen as nn
from flax.linen import partitioning
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.nn.layers import Dense, Dtype, LayerNorm
from coda_jax.nn.tokens import kept_first, running_count, take


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


class DepthwiseConvolution(nn.Module):
    """`causal_convolution` as a module without parameters, for methods to be put around it."""

    @nn.compact  # for what they create
    def __call__(
        self,
        x: Float[Array, "b n d"],
        kernel: Float[Array, "w d"],
        segment_ids: Int[Array, "b n"] | None,
    ) -> Float[Array, "b n d"]:
        """See `causal_convolution`."""
        return causal_convolution(x, kernel, segment_ids)


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
        """[B, N, D] -> [B, N, D]; `mask` is False for padding and for empty slots."""

        def norm(name):
            return LayerNorm(self.layer_norm_epsilon, self.dtype, name=name)

        def project(name, factor, axes):
            return Dense(factor * x.shape[-1], axes, dtype=self.dtype, name=name)

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
        segments = None if segment_ids is None else take(segment_ids, order)
        depthwise = DepthwiseConvolution(name="depthwise")
        y = depthwise(take(y, order), kernel.astype(self.dtype), segments)
        y = take(y, jnp.maximum(running_count(mask) - 1, 0))  # back to their places
        return project("wo", 1, ("mlp", "embed"))(nn.swish(norm("depthwise_layer_norm")(y)))
