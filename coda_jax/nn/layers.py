"""Projections, norms, embeddings and feed-forward blocks, with T5X's parameter and axis names.

Axis letters: B batch, N tokens, D embedding, F features, V vocabulary.
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
from jaxtyping import Array, Float, Int

Dtype = Any
Initializer = Callable[..., Array]

# Of `_blocked_product`, as measured: rows of a block, and the size of a result up to which it wins.
_BLOCK = 16
_BLOCKED_SIZE = 16384
ACTIVATIONS = (
    *["linear", "relu", "gelu", "silu", "swish", "tanh", "sigmoid", "softplus"],
    *["elu", "celu", "selu", "leaky_relu"],
)
_fan_in_truncated_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def activation_function(name: str) -> Callable[[Array], Array]:
    """The function of a name of `ACTIVATIONS`: of `flax.linen`, or the identity for "linear"."""
    return (lambda x: x) if name == "linear" else getattr(nn, name)


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
        """[..., D] -> [..., F]."""
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


def _apart(x: Array) -> Array:
    """x rounded to one bit less than float32 has: the compiler merges nothing across it."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=22)


@jax.custom_jvp
def sum_in_order(x: Float[Array, "... d"]) -> Float[Array, "..."]:
    """The sum over the last axis; on a CPU equal rows have equal sums, whatever the shape.

    XLA's CPU backend adds up a `reduce`, or a product with a vector, in an order that it picks by
    the size of the whole array. So here every addition is an operation of its own, in blocks of 64,
    8 and 1 channels. x is rounded first, to one bit less than float32 has: where x is a product,
    the compiler would else merge the product into the first addition in one program, with one
    rounding for both, and not in another.

    Other platforms use `jnp.sum`, which is cheap there.

    Args:
        x: [..., D] float32.

    Returns:
        [...] float32.
    """
    return lax.platform_dependent(x, cpu=_sum_of_blocks, default=lambda x: jnp.sum(x, axis=-1))


@sum_in_order.defjvp
def _sum_in_order_jvp(primals, tangents):
    return sum_in_order(*primals), jnp.sum(*tangents, axis=-1)


def _sum_of_blocks(x):
    x = _apart(x)
    for width in (64, 8, 1):
        blocks = -(-x.shape[-1] // width)
        if blocks > 1:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * width - x.shape[-1])])
            x = functools.reduce(operator.add, jnp.split(x, blocks, axis=-1))
    return x[..., 0]


def inverse_rms(x: Float[Array, "... d"], epsilon: float) -> Float[Array, "... 1"]:
    """1 / sqrt(mean(x^2) + epsilon) over the last axis, bit by bit as `sum_in_order`."""
    mean = _apart(sum_in_order(lax.square(x)) / x.shape[-1])
    # Not rsqrt: on CPUs it refines an estimate that one value and a vector of them get differently.
    return (1 / _apart(jnp.sqrt(mean + epsilon)))[..., None]


class RMSNorm(nn.Module):
    """x / rms(x) * scale, T5's layer norm: no mean is subtracted and there is no bias."""

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """[..., D] -> [..., D]."""
        scale = partitioning.param_with_axes(
            "scale", nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=("embed",)
        )
        x = x.astype(jnp.float32)
        x *= inverse_rms(x, self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) * scale + bias, in float32."""

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """[..., D] -> [..., D]."""

        def param(name, init):
            return partitioning.param_with_axes(
                name, init, (x.shape[-1],), jnp.float32, axes=("embed",)
            ).astype(jnp.float32)

        scale, bias = param("scale", nn.initializers.ones), param("bias", nn.initializers.zeros)
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= lax.rsqrt(jnp.mean(lax.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale + bias).astype(self.dtype)


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
        """Ids [B, N] -> vectors [B, N, D]."""
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
        """[B, N, D] -> [B, N, D]; with dropout where not `deterministic`."""
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
