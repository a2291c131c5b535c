"""A model whose frozen matrices are int8.

Matrices are the kernels of projections and the tables of embeddings; norms, biases, position biases
and the kernels of convolutions by channel stay as they are, as they are small.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from coda_jax import checks, methods, trees
from coda_jax.checkpoints.fingerprints import leaf_sha256
from coda_jax.models import ModelConfig
from coda_jax.nn.quantized import INT8, Quantized, quantized

_AXES = {"kernel": 0, "embedding": 1}  # by the name of a matrix: what is summed over for an output


def quantize(config: ModelConfig, params: Mapping[str, Any], kind: str = INT8) -> dict[str, Any]:
    """The parameters with the matrices that stay frozen as int8, a scale for each output.

    Adapter files and runs of such a model belong to the base as it was: fingerprints are its.

    Args:
        config: of the model with its methods, which say what is frozen.
        params: its parameter tree, or that of its base. What is quantised already stays so.
        kind: "int8".

    Raises:
        ValueError: a method is of no use beside such weights, or there is no such kind.
        FloatingPointError: a matrix has values that are not finite.
    """
    checks.OneOf((INT8,))("QUANTIZE", kind)
    if idle := [method.name for method in config.methods if not method.on_quantized]:
        raise ValueError(
            f"QUANTIZE={kind!r} is of no use to {idle}, whose result is the base itself, changed "
            "or smaller"
        )

    def made(path, leaf, axis):
        trees.check_finite({path: leaf})
        return quantized(leaf, axis, leaf_sha256(leaf))

    return _with_matrices(config, params, made)


def quantized_shapes(config: ModelConfig, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of shapes that `quantize` would give, in whose programs matrices are int8."""

    def made(path, leaf, axis):
        del path
        scale = tuple(1 if i == axis else size for i, size in enumerate(leaf.shape))
        values = jax.ShapeDtypeStruct(leaf.shape, np.int8)
        return Quantized(values, jax.ShapeDtypeStruct(scale, np.float32))

    return _with_matrices(config, shapes, made)


def _with_matrices(config, params, made):
    """The tree with what `made` gives of the (path, leaf, axis) of each frozen matrix."""
    flat = trees.flatten(params)
    for path, leaf in trees.flatten(methods.partition(config, params)[1]).items():
        axis = _AXES.get(path.rpartition("/")[2])
        if axis is not None and not isinstance(leaf, Quantized):
            flat[path] = made(path, leaf, axis)
    return trees.unflatten(flat)
