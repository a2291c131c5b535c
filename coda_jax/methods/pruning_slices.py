"""The smaller dense model that structured pruning leaves: matrices without what is gone.

Axis letters: H heads.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from coda_jax import trees
from coda_jax.methods.base import merge
from coda_jax.methods.pruning_groups import MASK, groups_of, is_of_heads, masks_of, without_layer

_BIAS = "relpos_bias/rel_embedding"  # [H, buckets]


def sliced(config: Any, params: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(config, params) of the merged model, whose matrices have only what stayed.

    Args:
        config: with `StructuredPruning`, and other methods that merge.
        params: the whole parameter tree.

    Raises:
        ValueError: nothing is pruned by heads and channels; another method does not merge; layers
            have kept different numbers, or different heads under a shared position bias.
    """
    masks = masks_of(trees.flatten(params))
    if not masks or not all(
        path.endswith(("/wo/" + MASK, "/dot_product/" + MASK)) for path in masks
    ):
        raise ValueError("there are no heads and channels that were pruned (kind 'splora')")
    kept = {path: np.flatnonzero(np.asarray(mask)) for path, mask in masks.items()}
    merged_config, merged = merge(config, params)
    if merged_config.methods:
        left = [method.name for method in merged_config.methods]
        raise ValueError(f"{left} cannot be merged, and a smaller model has no place for them")
    heads = {path: places for path, places in kept.items() if is_of_heads(path)}
    channels = {path: places for path, places in kept.items() if not is_of_heads(path)}
    sizes = {"num_heads": _number("heads", heads), "mlp_dim": _number("channels", channels)}
    leaves = trees.flatten(merged)
    for path in [path for path in leaves if path.endswith(_BIAS)]:
        leaves[path] = np.asarray(leaves[path])[_heads_of_bias(path, heads)]
    for path, places in kept.items():
        makers, reader = groups_of(path, leaves)
        for maker in makers:
            for name in ("kernel", "bias"):
                if f"{maker}/{name}" in leaves:
                    leaves[f"{maker}/{name}"] = _taken(
                        leaves[f"{maker}/{name}"], places, masks[path].size, -1
                    )
        leaves[f"{reader}/kernel"] = _taken(leaves[f"{reader}/kernel"], places, masks[path].size, 0)
    return merged_config.replace(**sizes), trees.unflatten(leaves)


def _taken(leaf, places, number, axis):
    """The rows or columns of the groups that stayed."""
    leaf = np.asarray(leaf)
    width = leaf.shape[axis] // number
    return np.take(leaf, (places[:, None] * width + np.arange(width)).reshape(-1), axis=axis)


def _number(what: str, kept: Mapping[str, np.ndarray]) -> int:
    """How many groups stayed in each set, which must be the same everywhere."""
    numbers = {path.removesuffix(f"/{MASK}"): len(places) for path, places in kept.items()}
    if len({*numbers.values()}) > 1:
        listed = "\n  ".join(f"{path}: {number}" for path, number in numbers.items())
        raise ValueError(
            f"layers have kept different numbers of {what}, for which Hugging Face's layout has no "
            f"place; prune with scope='uniform':\n  {listed}"
        )
    return next(iter(numbers.values()))


def _heads_of_bias(path: str, kept: Mapping[str, np.ndarray]) -> np.ndarray:
    """The heads of a position bias that stayed in the attentions that it is of."""
    owner = path.removesuffix(f"/{_BIAS}")
    of = {
        p: places
        for p, places in kept.items()
        if p.startswith(f"{owner}/") and "encoder_decoder_attention" not in without_layer(p)
    }
    first = next(iter(of.values()))
    different = [p for p, places in of.items() if not np.array_equal(places, first)]
    if different:
        raise ValueError(
            f"{path} is shared, and these layers have kept other heads than the first; prune with "
            "scope='uniform':\n  " + "\n  ".join(different)
        )
    return first
