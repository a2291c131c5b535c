"""Projections, norms, embeddings and feed-forward blocks, with T5X's parameter and axis names.

Axis letters: B batch, N tokens, D embedding, F features, V vocabulary.
Parameters are float32 unless the caller holds them otherwise; `dtype` is that of the computation.
"""

from collections.abc import Callable, Sequence
import functools
import math
import operator
from typing import Any

from flax import linen as nn
from flax import struct
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coda_jax.nn import processors
from coda_jax.nn.one_row import of_two_rows
from coda_jax.nn.quantized import Quantized, matrix, product_by_blocks, product_of_rows
from coda_jax.nn.sums import inverse_rms

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


@struct.dataclass
class Normalized:
    """x / rms(x) * scale, not multiplied out: each product decides when.

    Attributes:
        x: [..., D] in the dtype of the computation.
        inverse_rms: [..., 1] float32.
        scale: [D] float32.
    """

    x: Float[Array, "... d"]
    inverse_rms: Float[Array, "... 1"]
    scale: Float[Array, "d"]

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., D]."""
        return self.x.shape

    @property
    def dtype(self) -> Dtype:
        """Of `array`."""
        return self.x.dtype

    def array(self) -> Float[Array, "... d"]:
        """[..., D] in the dtype of x."""
        x = self.x.astype(jnp.float32) * self.inverse_rms
        return x.astype(self.x.dtype) * self.scale.astype(self.x.dtype)


Vectors = Float[Array, "... d"] | Normalized


class Dense(nn.Module):
    """x W, plus a bias if asked for. W is a matrix [inputs, outputs], also where it makes heads.

    Attributes:
        features: size of the last axis of the result.
        kernel_axes: logical names of the kernel's two axes.
        kernel_init: initializer of the kernel.
        dtype: of the computation.
        use_bias: whether there is a bias; T5 has none.
        input_heads: heads that the inputs are made of, one behind the other.
        output_heads: heads that the outputs are made of.
    """

    features: int
    kernel_axes: tuple[str, str]
    kernel_init: Initializer = _fan_in_truncated_normal
    dtype: Dtype = jnp.float32
    use_bias: bool = False
    input_heads: int = 1
    output_heads: int = 1

    @nn.compact
    def __call__(self, x: Vectors) -> Float[Array, "... f"]:
        """[..., D] -> [..., F]."""
        shape, heads = (x.shape[-1], self.features), (self.input_heads, self.output_heads)
        kernel = matrix(self, "kernel", self.kernel_init, shape, self.kernel_axes)
        if isinstance(kernel, Quantized):
            y = product_of_quantized(x, kernel, self.dtype, *heads)
        elif self.dtype == jnp.float32 and kernel.dtype == jnp.bfloat16 == x.dtype:
            y = product_in_float32(x, kernel)
        else:
            y = product(x, kernel.astype(self.dtype), *heads)
        if self.use_bias:
            y += partitioning.param_with_axes(
                "bias",
                nn.initializers.zeros,
                (self.features,),
                jnp.float32,
                axes=self.kernel_axes[1:],
            ).astype(self.dtype)
        return y


def product(
    x: Vectors, kernel: Float[Array, "d f"], input_heads: int = 1, output_heads: int = 1
) -> Float[Array, "... f"]:
    """x W in the dtype of W, in whichever way the platform does it fastest.

    Args:
        x: [..., D].
        kernel: W, [D, F].
        input_heads: heads that D is made of.
        output_heads: heads that F is made of.
    """
    heads = input_heads, output_heads
    if isinstance(x, Normalized):
        # With fewer rows than the kernel has, it is cheaper to scale the rows.
        if kernel.dtype != jnp.bfloat16 or math.prod(x.shape[:-1]) < kernel.shape[0]:
            return product(x.array(), kernel, *heads)
        return lax.platform_dependent(
            x,
            kernel,
            tpu=functools.partial(_scaled_product, heads),
            default=lambda x, kernel: product(x.array(), kernel, *heads),
        )
    x = x.astype(kernel.dtype)
    if x.ndim == 3 and x.shape[1] == 1:
        return _product_of_rows(x[:, 0], kernel)[:, None]
    if kernel.dtype == jnp.float32:
        return _product_of_heads(heads, x, kernel)
    named = functools.partial(_rounded_product, heads)
    cpu = jnp.matmul if _is_faster_rounded(kernel.dtype) else named
    return lax.platform_dependent(x, kernel, cpu=cpu, cuda=_product_alone, default=named)


def _is_faster_rounded(dtype: Dtype) -> bool:
    """Whether this CPU is faster, by a quarter, if no float32 result is asked for."""
    return dtype == jnp.bfloat16 and not processors.multiplies_bfloat16()


def _product_alone(x, kernel):
    """For GPUs, which add up in float32 anyway. XLA would join kernels, and copy results apart."""
    return jnp.matmul(*lax.optimization_barrier((x, kernel)))


def product_in_float32(x: Vectors, kernel: Float[Array, "d f"]) -> Array:
    """x W in float32, of which bfloat16 needs no conversion: its products are exact there.

    Args:
        x: [..., D].
        kernel: W, [D, F].
    """
    x = x.array() if isinstance(x, Normalized) else x
    if not x.dtype == kernel.dtype == jnp.bfloat16:
        x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return of_two_rows(multiply)(x, kernel)


def product_of_quantized(
    x: Vectors, kernel: Quantized, dtype: Dtype, input_heads: int = 1, output_heads: int = 1
) -> Float[Array, "... f"]:
    """x W in a dtype, with W int8 in memory, also until the gradient of x needs it again.

    Args:
        x: [..., D].
        kernel: W, [D, F].
        dtype: of the result; the product is in that of x where it is smaller, with float32 sums.
        input_heads: heads that D is made of.
        output_heads: heads that F is made of.
    """

    @jax.checkpoint
    def of_values(x, values):
        if len(x.shape) == 3 and x.shape[1] == 1:
            x = x.array() if isinstance(x, Normalized) else x
            return product_of_rows(x[:, 0], values)[:, None]
        return lax.platform_dependent(x, values, cpu=by_blocks, default=whole)

    def whole(x, values):
        if dtype == jnp.float32 and x.dtype == jnp.bfloat16:
            found = product_in_float32(x, values.astype(x.dtype))
        else:
            found = product(x, values.astype(dtype), input_heads, output_heads)
        return found.astype(jnp.float32)

    def by_blocks(x, values):
        x = x.array() if isinstance(x, Normalized) else x
        in_dtype = x.dtype == jnp.bfloat16 and processors.multiplies_bfloat16()
        rows = x.reshape(-1, x.shape[-1]).astype(x.dtype if in_dtype else jnp.float32)
        return product_by_blocks(rows, values).reshape(*x.shape[:-1], -1)

    return (of_values(x, kernel.values) * kernel.scale[0]).astype(dtype)


def _product_of_rows(x, kernel):
    """[B, D] x [D, F], of a decoding step, in which W is all there is to read."""
    blocked = kernel.shape[0] % _BLOCK == 0 and 1 < len(x) <= _BLOCKED_SIZE // kernel.shape[1]
    blocked &= kernel.dtype != jnp.float32 or not processors.reads_matrices_fast()
    whole = jnp.matmul if _is_faster_rounded(kernel.dtype) else _whole_product
    cpu = _blocked_product if blocked else whole
    return lax.platform_dependent(x, kernel, cpu=cpu, default=of_two_rows(_whole_product))


def _whole_product(x, kernel):
    # The type of the result is named: else a TPU does not fetch W under what comes before.
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _blocked_product(x, kernel):
    """x W as a sum over blocks of W's rows, which most CPUs read faster (docs/performance.md).

    XLA rearranges W before it multiplies, column by column: a few rows of x wait for the memory.
    """
    blocks = kernel.reshape(-1, _BLOCK, kernel.shape[1])
    x_blocks = x.reshape(x.shape[0], -1, _BLOCK)
    parts = jnp.einsum("bgk,gkf->gbf", x_blocks, blocks, preferred_element_type=jnp.float32)
    return parts.sum(axis=0).astype(x.dtype)


def _product_of_heads(heads, x, kernel):
    """In float32; with the heads as an axis, TPUs lay them out before the tokens at no cost."""
    input_heads, output_heads = heads
    x_heads = x.reshape(*x.shape[:-1], input_heads, -1)
    kernel_heads = kernel.reshape(input_heads, x_heads.shape[-1], output_heads, -1)
    y = jnp.einsum("...ik,ikho->...ho", x_heads, kernel_heads, preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_product(heads, x, kernel):
    """Rounded to the type of x, forwards and backwards: no product has factors in float32."""
    return _product_of_heads(heads, x, kernel).astype(x.dtype)


def _rounded_product_fwd(heads, x, kernel):
    return _rounded_product(heads, x, kernel), (x, kernel)


def _rounded_product_bwd(heads, saved, cotangent):
    x, kernel = saved
    of_kernel = jnp.einsum("...d,...f->df", x, cotangent, preferred_element_type=jnp.float32)
    of_x = _product_of_heads(heads[::-1], cotangent, kernel.T)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


_rounded_product.defvjp(_rounded_product_fwd, _rounded_product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled_product(heads, x: Normalized, kernel):
    """The scale is multiplied into the kernel, and the rows are normalised last.

    So that on a TPU nothing passes over x but the product itself.
    """
    scaled = (x.scale[:, None] * kernel).astype(kernel.dtype)
    return (_product_of_heads(heads, x.x.astype(kernel.dtype), scaled) * x.inverse_rms).astype(
        kernel.dtype
    )


def _scaled_product_fwd(heads, x, kernel):
    return _scaled_product(heads, x, kernel), (x, kernel)


def _scaled_product_bwd(heads, saved, cotangent):
    # Through the norm, so that the scale's gradient needs no array of the kernel's size.
    def multiplied_out(x, kernel):
        return _product_of_heads(heads, x.array(), kernel).astype(kernel.dtype)

    return jax.vjp(multiplied_out, *saved)[1](cotangent)


_scaled_product.defvjp(_scaled_product_fwd, _scaled_product_bwd)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, T5's layer norm: no mean is subtracted and there is no bias."""

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Normalized:
        """[..., D] -> [..., D], not multiplied out."""
        scale = partitioning.param_with_axes(
            "scale", nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=("embed",)
        )
        inverse = inverse_rms(x.astype(jnp.float32), self.epsilon)
        return Normalized(x.astype(self.dtype), inverse, scale)


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
        shape = self.num_embeddings, self.features
        self.embedding = matrix(
            self, "embedding", nn.initializers.normal(1.0), shape, ("vocab", "embed")
        )

    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Ids [B, N] -> vectors [B, N, D]."""
        tokens = tokens.astype(jnp.int32)  # T5X makes the parameters with tokens of float32
        # A TPU copies a table of int8 to take one row of it; two it takes from where they are.
        alone = tokens.size == 1 and isinstance(self.embedding, Quantized)
        rows = jnp.pad(tokens, ((0, 1), (0, 0))) if alone else tokens
        # Of a quantised table values and scales: each row has one.
        x = jax.tree.map(lambda table: jnp.take(table, rows, axis=0), self.embedding)
        x = x.astype(self.dtype)[: len(tokens)]
        return partitioning.with_sharding_constraint(x, ("batch", "length", "embed"))

    def attend(self, x: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Logits x E^T in float32."""
        if not isinstance(self.embedding, Quantized):
            return product_in_float32(x, self.embedding.T)
        values, scale = self.embedding.values, self.embedding.scale[:, 0]
        if x.shape[1] == 1:
            return (product_of_rows(x[:, 0], values, transposed=True) * scale)[:, None]
        return product_in_float32(x, values.T.astype(x.dtype)) * scale


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
    def __call__(self, x: Vectors, deterministic: bool) -> Float[Array, "b n d"]:
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
