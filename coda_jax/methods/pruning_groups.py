"""Which leaves belong to the groups of a mask, by their paths.

A set of groups is the heads of an attention, with the mask `<attention>/dot_product/pruning_mask`,
or the hidden channels of a feed-forward block, with the mask `<block>/wo/pruning_mask`.

Axis letters: G groups.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax import trees
from coda_jax.methods.base import Place

MASK = "pruning_mask"
# What may vanish lies in these: heads, and hidden channels of feed-forward blocks.
PROJECTIONS = (r"(attention|mlp)/(query|key|value|out|wi|wi_\d|wo)$",)


def is_prunable(path: str) -> bool:
    """Whether the module at a path has a matrix of groups."""
    return trees.matches(path, PROJECTIONS)


def targets_of(config: Any, place: Place) -> list[Any]:
    """The projections of a layer that have groups."""
    return [p for p in config.projections(place) if is_prunable(p.path)]


def masks_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The masks among leaves, by path."""
    return {path: leaf for path, leaf in leaves.items() if path.endswith(f"/{MASK}")}


def is_of_heads(path: str) -> bool:
    """Whether the groups of a mask are heads."""
    return path.endswith(f"dot_product/{MASK}")


def without_layer(path: str) -> str:
    """The path that all layers of a stack share."""
    return "/".join(part for part in path.split("/") if not part.startswith("layers_"))


def groups_of(path: str, names: Mapping[str, Any]) -> tuple[list[str], str]:
    """The modules whose columns belong to a mask, and that whose rows do."""
    block = path.rsplit("/", 2)[0]
    if is_of_heads(path):
        return [f"{block}/{name}" for name in ("query", "key", "value")], f"{block}/out"
    makers = {p.rpartition("/")[0] for p in names if p.startswith(f"{block}/wi")}
    return sorted(makers), f"{block}/wo"


def has_kernels(leaves: Mapping[str, Any]) -> bool:
    """Whether the matrices that the groups of all masks lie in are among the leaves."""
    return all(f"{groups_of(path, leaves)[1]}/kernel" in leaves for path in masks_of(leaves))


def cost_of(path: str, number: int, leaves: Mapping[str, Any]) -> int:
    """Weights of a group of the sets of a mask; 1 where the groups are blocks."""
    if leaves[path].ndim > 1:
        return 1

    def size(module, axis):
        leaf = f"{module}/{('pruning_rows', 'pruning_columns')[axis]}"
        return leaves[leaf if leaf in leaves else f"{module}/kernel"].shape[axis]

    makers, reader = groups_of(path, leaves)
    return size(reader, 0) // number * (sum(size(x, 0) for x in makers) + size(reader, 1))


def group_norms(block: Mapping[str, Any], number: int) -> Float[Array, "g"]:
    """The norms of the groups' weights with their updates, of the leaves of a block."""
    reader = "wo" if "wo" in block else "out"
    total = jnp.zeros(number)
    for name, leaves in block.items():
        if name != reader and name not in ("query", "key", "value") and not name.startswith("wi"):
            continue
        kernel = leaves["kernel"]
        if "pruning_rows" in leaves:
            kernel = kernel + leaves["pruning_rows"] @ leaves["pruning_columns"]
        squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=int(name == reader))
        total += squares.reshape(number, -1).sum(-1)
    return jnp.sqrt(total)


def silence(leaves: dict[str, Any], path: str, mask: Array, *names: str) -> None:
    """Sets columns of the modules of a mask's groups, and rows of the reader, to zero.

    Args:
        leaves: changed in place.
        path: of the mask.
        mask: [G].
        names: of the leaves with these columns and rows; none for kernels, and biases.
    """
    makers, reader = groups_of(path, leaves)
    columns, rows = names or ("kernel", "kernel")

    def keep(path, axis):
        leaf = jnp.asarray(leaves[path])
        kept = jnp.repeat(mask > 0, leaf.shape[axis] // mask.size)
        leaves[path] = jnp.where(kept[:, None] if axis == 0 and leaf.ndim > 1 else kept, leaf, 0)

    for maker in makers:
        keep(f"{maker}/{columns}", 1)
        if not names and f"{maker}/bias" in leaves:
            keep(f"{maker}/bias", 0)
    keep(f"{reader}/{rows}", 0)
