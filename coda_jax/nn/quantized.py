"""Matrices that nothing changes as int8, with a float32 scale for each output.

Only the weights are int8: they are whole numbers that bfloat16 and float32 hold exactly, so a
product multiplies by them as they are, and its outputs by the scales. Values that leave the range
of a type, which the feed-forward's `wo` of T5 is known for, are activations, and those stay as they
were.

Axis letters: B batch, D inputs, F outputs, V vocabulary, n and m the sides of a matrix.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import struct
from flax.linen import partitioning
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from coda_jax import checks, trees
from coda_jax.nn.one_row import of_two_rows

INT8 = "int8"
KIND = checks.Maybe(checks.OneOf((INT8,)))  # of quantisation, None for none
_LARGEST = 127
# Of `product_of_rows`: elements of a block, so that it stays in a core's cache as float32, and the
# fewest with which a loop over blocks is worth it.
_BLOCK, _LEAST = 2**19, 2**14


@struct.dataclass
class Quantized:
    """W = values * scale, in a quarter of float32's memory.

    It stands in a tree of parameters where W did, and what reads it as an array gets W.

    Attributes:
        values: int8, from -127 to 127.
        scale: float32, [1, F] for x W and [V, 1] for the table of an `Embed`.
        origin: the fingerprint of the leaf that it was made of.
    """

    values: Int[Array, "n m"]
    scale: Float[Array, "..."]
    origin: str = struct.field(pytree_node=False, default="")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """2."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Of W."""
        return self.values.size

    @property
    def dtype(self) -> np.dtype:
        """Of W, as it is read."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return self.values.nbytes + self.scale.nbytes

    def astype(self, dtype: Any) -> Float[Array, "n m"]:
        """W in a dtype."""
        return (self.values.astype(np.float32) * self.scale).astype(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # there is no array of W that could be shared
        return np.asarray(self.astype(np.float32)).astype(dtype or np.float32, copy=False)

    def __jax_array__(self) -> Float[Array, "n m"]:
        return jnp.asarray(self.astype(jnp.float32))


def quantized(leaf: Any, axis: int, origin: str) -> Quantized:
    """The nearest int8 matrix to W; the largest value of each output is 127 or -127.

    Args:
        leaf: W, float.
        axis: that is summed over for an output: 0 for x W, 1 for a table of embeddings.
        origin: the fingerprint of W.
    """
    w = np.asarray(leaf, np.float32)
    largest = np.abs(w).max(axis=axis, keepdims=True)
    scale = (largest / np.float32(_LARGEST)).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1))  # for zeros, and what is nearly zero
    # The quotient of a tiny scale may be rounded beyond the largest value.
    values = np.clip(np.rint(w / scale), -_LARGEST, _LARGEST).astype(np.int8)
    return Quantized(values, scale, origin)


def quantization_of(params: Mapping[str, Any]) -> str | None:
    """How leaves of a tree are quantised; None where none is."""
    found = any(isinstance(leaf, Quantized) for leaf in trees.flatten(params).values())
    return INT8 if found else None


def check_float(params: Mapping[str, Any], layout: str) -> None:
    """Raises ValueError where leaves are quantised, for which a layout has no place."""
    if kind := quantization_of(params):
        raise ValueError(
            f"{layout} holds float weights, and these are {kind}: LAYOUT='adapter' writes what was "
            "trained beside them"
        )


def matrix(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, int],
    axes: tuple[str, str],
) -> Float[Array, "n m"] | Quantized:
    """A parameter of a module, float32 when it is made; as int8 where it is given so.

    Args:
        module: which asks.
        name: of the leaf.
        init: its initializer.
        shape: its sizes.
        axes: their logical names.
    """
    found = module.get_variable("params", name)
    if isinstance(found, Quantized):
        return found
    return partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)


def product_of_rows(
    x: Float[Array, "b d"], values: Int[Array, "n m"], transposed: bool = False
) -> Float[Array, "b f"]:
    """x W of a few rows, or x W^T, in which W is all there is to read: [B, F] float32.

    Args:
        x: [B, D].
        values: W, [D, F] or, transposed, [F, D].
        transposed: whether W is.
    """

    def by_blocks(x, values):
        return product_by_blocks(x.astype(jnp.float32), values, transposed)

    def whole(x, values):
        return _whole(x, values, transposed)

    return lax.platform_dependent(x, values, cpu=by_blocks, default=of_two_rows(whole))


def product_by_blocks(
    x: Float[Array, "b d"], values: Int[Array, "n m"], transposed: bool = False
) -> Float[Array, "b f"]:
    """The same, of any rows in their dtype: for CPUs.

    XLA's backend for them writes W as floats before it multiplies, and that of all layers as soon
    as a program starts. A block of a loop stays in the cache.
    """
    rows = _rows_of_block(values.shape)
    if rows == len(values):
        return _whole(x, values, transposed)
    blocks = values.reshape(-1, rows, values.shape[1])
    if transposed:
        parts = lax.map(lambda block: _whole(x, block, transposed), blocks)
        return jnp.moveaxis(parts, 0, 1).reshape(len(x), -1)
    parts = jnp.moveaxis(x.reshape(len(x), -1, rows), 1, 0)
    # Zeros that wait for x: those of all layers would be written as soon as a program starts.
    start = jnp.broadcast_to(0.0 * x[:, :1].astype(jnp.float32), (len(x), values.shape[1]))
    return lax.scan(lambda y, block: (y + _whole(*block, False), None), start, (parts, blocks))[0]


def _whole(x, values, transposed):
    values = values.T if transposed else values
    return jnp.matmul(x, values.astype(x.dtype), preferred_element_type=jnp.float32)


def _rows_of_block(shape):
    """The most rows that divide a matrix into blocks that fit; all, where blocks would be tiny."""
    rows, width = shape
    most = max(1, min(rows, _BLOCK // width))
    found = next(n for n in range(most, 0, -1) if rows % n == 0)
    return found if found * width >= _LEAST else rows
