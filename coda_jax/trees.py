"""Trees of parameters: paths and patterns, parts and wholes, checks.

A path is the keys of a leaf joined by "/", for example "encoder/layers_0/adapter/wi/kernel".
A tree is a nested mapping whose leaves have a `shape`; a flat mapping of paths is one too.
"""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

from jax import Array
import numpy as np


def flatten(params: Mapping) -> dict[str, Any]:
    """Returns {path: leaf} of a nested mapping, in sorted order of the paths."""
    flat = {}

    def visit(prefix: str, node: Any) -> None:
        for key, value in node.items():
            path = f"{prefix}/{key}" if prefix else str(key)
            if isinstance(value, Mapping):
                visit(path, value)
            elif path in flat:
                raise ValueError(f"two leaves have the path {path!r}")
            else:
                flat[path] = value

    visit("", params)
    return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Returns the nested dict of {path: leaf}: the inverse of `flatten`."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} lies under another leaf")
        if name in node:
            raise ValueError(f"{path!r} is both a leaf and a folder of leaves")
        node[name] = leaf
    return nested


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Returns True if any pattern is found in `path`."""
    return any(re.search(pattern, path) for pattern in patterns)


def split(params: Mapping, patterns: tuple[str, ...]) -> tuple[dict, dict]:
    """Returns (leaves that match any pattern, all others) as two pruned trees."""
    flat = flatten(params)
    inside = {path: leaf for path, leaf in flat.items() if matches(path, patterns)}
    outside = {path: leaf for path, leaf in flat.items() if path not in inside}
    return unflatten(inside), unflatten(outside)


def merge(first: Mapping, second: Mapping) -> dict:
    """Returns one tree with the leaves of both.

    Raises:
        ValueError: if a path is in both; lists all of them.
    """
    flat_first, flat_second = flatten(first), flatten(second)
    both = sorted(flat_first.keys() & flat_second.keys())
    if both:
        raise ValueError("leaves present on both sides of a merge:\n  " + "\n  ".join(both))
    return unflatten(dict(sorted({**flat_first, **flat_second}.items())))


def weighted_sum(
    leaves: Sequence[Mapping[str, Any]], weights: Sequence[float]
) -> dict[str, np.ndarray]:
    """{path: sum of weight x leaf} of flat trees, added up in float64, in the dtype of the first.

    Raises:
        ValueError: if they have other leaves or shapes; lists all of them.
    """
    for other in leaves[1:]:
        check_tree(leaves[0], other, what="the leaves to be added do")
    return {
        path: sum(
            weight * np.asarray(tree[path], np.float64)
            for tree, weight in zip(leaves, weights, strict=True)
        ).astype(np.asarray(first).dtype)
        for path, first in leaves[0].items()
    }


def count(params: Mapping) -> int:
    """Returns the number of scalars in a tree."""
    return sum(math.prod(leaf.shape) for leaf in flatten(params).values())


def check_tree(
    expected: Mapping,
    actual: Mapping,
    allow_missing: tuple[str, ...] | None = None,
    what: str = "the parameters do",
) -> None:
    """Checks that two trees have the same leaves with the same shapes.

    Args:
        expected: tree of anything with a `shape`, e.g. from `jax.eval_shape`.
        actual: the tree to check; a shape that is None is not known, and may be any.
        allow_missing: patterns of leaves that `actual` may lack.
        what: how the error sentence begins.

    Raises:
        ValueError: lists every missing, extra and misshapen leaf, with shapes.
    """
    flat_expected, flat_actual = flatten(expected), flatten(actual)
    problems = []
    for path, leaf in flat_expected.items():
        if path not in flat_actual:
            if not matches(path, allow_missing or ()):
                problems.append(f"missing: {path} {tuple(leaf.shape)}")
        elif (found := flat_actual[path].shape) is not None and tuple(found) != tuple(leaf.shape):
            problems.append(f"wrong shape: {path} is {tuple(found)}, expected {tuple(leaf.shape)}")
    for path, leaf in flat_actual.items():
        if path not in flat_expected:
            shape = "" if leaf.shape is None else f" {tuple(leaf.shape)}"
            problems.append(f"extra: {path}{shape}")
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{what} not match the model ({len(problems)} leaves):\n  {lines}")


def check_finite(leaves: Mapping[str, np.ndarray | Array]) -> None:
    """Raises FloatingPointError, naming the first of {path: leaf} that holds NaN or infinity."""
    for path, leaf in leaves.items():
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            raise FloatingPointError(f"the parameter {path} has values that are not finite")
