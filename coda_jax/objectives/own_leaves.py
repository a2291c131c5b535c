"""A network in which each row of a batch has its own trained leaves: its adapter, router and norms.

The network is mapped over the rows. What is frozen is the same for all of them, so its products
stay products of the whole batch with one matrix; those with trained leaves become batched ones.

Axis letters: B rows of a batch, n what belongs to one of them: 1, or its beams.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from coda_jax import methods, trees
from coda_jax.nn.attention import MATRICES
from coda_jax.sharding import mapped_over_rows


class OwnLeaves:
    """A network, called as it is, whose trained leaves have an axis of rows in front, [B, ...].

    Every array that it is called with has B * n rows, those of one row of the batch one behind the
    other.

    Attributes:
        config: of the network.
        input_mask: of the network.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self.config = module.config
        self.input_mask = module.input_mask

    def apply(self, variables: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """What `apply` of the network gives; an intermediate result without rows stays one."""
        own, frozen = methods.partition(self.config, variables["params"])
        rows = len(next(iter(jax.tree.leaves(own))))
        others = {name: x for name, x in variables.items() if name != "params"}
        arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array | np.ndarray)}
        fixed = {name: x for name, x in options.items() if name not in arrays}

        def of_row(own, others, arguments, arrays):
            params = trees.merge(frozen, own)
            found = self._module.apply({"params": params, **others}, *arguments, **arrays, **fixed)
            return _without_matrices(found)

        given = others, arguments, arrays
        with mapped_over_rows() as mesh_axis:
            found = jax.vmap(
                of_row,
                (0, *jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, given)),
                spmd_axis_name=mesh_axis,
            )(own, *jax.tree.map(lambda x: _split(x, rows), given))
        return jax.tree.map(_joined, found)


def _without_matrices(found):
    """An output, with a decoder's cache without the matrices that rows would have to share."""
    if not isinstance(found, tuple) or "cache" not in found[1]:
        return found
    cache = trees.flatten(found[1]["cache"])
    kept = {path: x for path, x in cache.items() if not path.endswith(MATRICES)}
    return found[0], {**found[1], "cache": trees.unflatten(kept)}


def _split(x, rows):
    """[B * n, ...] -> [B, n, ...]; a scalar stays one."""
    return x.reshape(rows, -1, *x.shape[1:]) if jnp.ndim(x) else x


def _joined(x):
    """[B, n, ...] -> [B * n, ...]; a scalar, which is the same for all rows, stays one."""
    return x.reshape(-1, *x.shape[2:]) if x.ndim > 1 else x[0]
