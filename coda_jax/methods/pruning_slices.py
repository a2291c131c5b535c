"""The smaller dense model that structured pruning leaves: matrices without what is gone.

Axis letters: H heads.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from coda_jax import trees
from coda_jax.methods.base import merge
from coda_jax.methods.pruning_groups import MASK, groups_of, is_of_heads, masks_of

_BIAS = "relpos_bias/rel_embedding"  # [H, buckets]


def sliced(config: Any, params: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(config, params) of the merged model, whose matrices have only what stayed.

    Where layers have kept different numbers of heads or channels, the config says those of each
    (`layer_sizes`). Where they have kept different heads, those of a position bias that they shared
    become each layer's own.

    Args:
        config: with `StructuredPruning`, and other methods that merge.
        params: the whole parameter tree.

    Raises:
        ValueError: nothing is pruned by heads and channels, or a mask is none; another method does
            not merge.
    """
    masks = {p: np.asarray(mask) for p, mask in masks_of(trees.flatten(params)).items()}
    if not masks or not all(
        path.endswith(("/wo/" + MASK, "/dot_product/" + MASK)) for path in masks
    ):
        raise ValueError("there are no heads and channels that were pruned (kind 'splora')")
    wrong = [path for path, x in masks.items() if not np.isin(x, (0, 1)).all() or not x.any()]
    if wrong:
        raise ValueError(f"masks must be of zeros and ones, with a one at least: {wrong} are not")
    kept = {path: np.flatnonzero(mask) for path, mask in masks.items()}
    merged_config, merged = merge(config, params)
    if merged_config.methods:
        left = [method.name for method in merged_config.methods]
        raise ValueError(f"{left} cannot be merged, and a smaller model has no place for them")
    leaves = trees.flatten(merged)
    changes = _sizes(merged_config, kept)
    changes |= _cut_biases(merged_config, leaves, kept, dict(changes["layer_sizes"]))
    for path, places in kept.items():
        makers, reader = groups_of(path, leaves)
        for maker in makers:
            for name in ("kernel", "bias"):
                if f"{maker}/{name}" in leaves:
                    leaves[f"{maker}/{name}"] = _taken(
                        leaves[f"{maker}/{name}"], places, masks[path].size, -1
                    )
        leaves[f"{reader}/kernel"] = _taken(leaves[f"{reader}/kernel"], places, masks[path].size, 0)
    return merged_config.replace(**changes), trees.unflatten(dict(sorted(leaves.items())))


def _taken(leaf, places, number, axis):
    """The rows or columns of the groups that stayed."""
    leaf = np.asarray(leaf)
    width = leaf.shape[axis] // number
    return np.take(leaf, (places[:, None] * width + np.arange(width)).reshape(-1), axis=axis)


def _block(path: str) -> str:
    """The path of the attention or the feed-forward that a mask is of."""
    return path.rsplit("/", 2)[0]


def _sizes(config: Any, kept: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of the config that say how many groups stayed in each block."""
    numbers: dict[str, dict[str, int]] = {}  # of the blocks whose size a field says
    for path, places in kept.items():
        stack, _, block = _block(path).split("/")
        numbers.setdefault(config.blocks[stack][block], {})[_block(path)] = len(places)
    changes, others = {}, []
    for field, found in numbers.items():
        same = len({*found.values()}) == 1
        changes[field] = next(iter(found.values())) if same else getattr(config, field)
        others += [item for item in found.items() if item[1] != changes[field]]
    return {**changes, "layer_sizes": tuple(sorted(others))}


def _cut_biases(
    config: Any,
    leaves: dict[str, Any],
    kept: Mapping[str, np.ndarray],
    layer_sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Leaves of each position bias the heads that stayed.

    Args:
        config: of the merged model.
        leaves: its leaves by path, changed in place.
        kept: the groups that stayed, by the path of their mask.
        layer_sizes: of the blocks whose size is not the usual one, which share no bias.

    Returns:
        What changes in the config.
    """
    heads = {_block(path): places for path, places in kept.items() if is_of_heads(path)}
    biases = {}
    for path in [path for path in leaves if path.endswith(_BIAS)]:
        owner = path.removesuffix(_BIAS)
        biases[path] = {
            block: places
            for block, places in heads.items()
            if block.startswith(owner) and block.rpartition("/")[2] in config.biased
        }
    alike = all(
        len({x.tobytes() for x in of.values()}) == 1 and not of.keys() & layer_sizes
        for of in biases.values()
    )
    for path, of in biases.items():
        bias = np.asarray(leaves.pop(path))
        for block, places in of.items():
            own = f"{block.rpartition('/')[0]}/{_BIAS}"
            leaves[path if alike else own] = bias[places]
    return {} if alike else {"shared_relpos_bias": False}
