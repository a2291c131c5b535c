"""Several adapters of one base as one, with a weight for each.

What a weighted sum is, each method says of its own leaves (`Method.combined`): by default that of
the leaves; of LoRA that of the updates A B, which is exact. Leaves of the base that are trained,
such as norms, become base + sum of weight x (leaf - base).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coda_jax import checks, trees
from coda_jax.methods.base import created, finish, partition


def combine_adapters(
    params: Mapping[str, Any],
    adapters: Sequence[tuple[Any, Mapping[str, Any]]],
    weights: Sequence[float],
) -> tuple[Any, dict[str, Any]]:
    """One adapter in the place of several of the same methods.

    Args:
        params: the parameter tree of their base.
        adapters: (config, whole parameter tree) of each, as `load_adapter` returns them.
        weights: one for each. Where they do not add up to 1, what starts at random, such as a
            router, becomes larger or smaller as a whole.

    Returns:
        (config, params) of the model with the combined adapter.

    Raises:
        ValueError: there are none; a weight is not finite, or there are more or fewer; the adapters
            have another base, or heads or methods of their own, or methods that cannot be added.
        FloatingPointError: a leaf is not finite.
    """
    weights = checks.Each(checks.Number())("WEIGHTS", weights)
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"there are {len(adapters)} adapters and the weights {weights}")
    adapters = [finish(*adapter) for adapter in adapters]
    config = adapters[0][0]
    parts = [[trees.flatten(part) for part in partition(*adapter)] for adapter in adapters]
    base = trees.flatten(params)
    shared = base.keys() & parts[0][1].keys()
    check_same_base({p: parts[0][1][p] for p in shared}, {p: base[p] for p in shared})
    for (other, _), (_, frozen) in zip(adapters[1:], parts[1:], strict=True):
        _check_alike(config, other)
        check_same_base(parts[0][1], frozen)
    trained = [leaves for leaves, _ in parts]
    for leaves in trained:
        trees.check_finite(leaves)
    combined, found = [], parts[0][1]
    for i, method in enumerate(config.methods):
        own = [_matching(leaves, method.creates) for leaves in trained]
        of_kind = [other.methods[i] for other, _ in adapters]
        method, leaves = type(method).combined(of_kind, own, weights)
        combined.append(method)
        found |= leaves
    new = created(config)
    others = [{p: x for p, x in flat.items() if not trees.matches(p, new)} for flat in trained]
    found |= _moved(base, others, weights)
    return config.replace(methods=tuple(combined)), trees.unflatten(dict(sorted(found.items())))


def _matching(leaves, patterns):
    return {path: leaf for path, leaf in leaves.items() if trees.matches(path, patterns)}


def _moved(base, leaves, weights):
    """Weighted sums of leaves, of which those of the base are moved by the sum of their changes."""
    shared = {path: base[path] for path in leaves[0] if path in base}
    of_base = [{path: flat[path] for path in shared} for flat in leaves]
    new = [{path: x for path, x in flat.items() if path not in shared} for flat in leaves]
    rest = 1 - sum(weights)
    return trees.weighted_sum([*of_base, shared], [*weights, rest]) | trees.weighted_sum(
        new, weights
    )


def _check_alike(config, other):
    """Raises ValueError where adapters have other methods, or models other fields."""
    names = [[method.name for method in c.methods] for c in (config, other)]
    if names[0] != names[1]:
        raise ValueError(f"adapters of other methods cannot be added: {names[0]} and {names[1]}")
    if other.family != config.family:
        raise ValueError(f"one adapter is of a {config.family!r}, another of a {other.family!r}")
    if different := config.differences(other, ("methods",)):
        raise ValueError(f"the adapters' models differ: {'; '.join(different)}")


def check_same_base(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raises ValueError unless frozen leaves, {path: leaf}, are the same, bit by bit."""
    different = sorted(first.keys() ^ second.keys())
    different += [
        path
        for path in first.keys() & second.keys()
        if first[path] is not second[path]
        and not np.array_equal(np.asarray(first[path]), np.asarray(second[path]))
    ]
    if different:
        lines = "\n  ".join(sorted(different))
        raise ValueError(f"the adapters have other bases; frozen leaves differ:\n  {lines}")
