"""Several targets for one input in one row of the decoder, with their common prefixes once.

The row's tokens are the nodes of a tree, the start token its root; a node sees its ancestors and
itself, and its relative positions are those along the way to it.

Axis letters: M nodes, L targets, T tokens of the longest target.
"""

from collections.abc import Sequence
import dataclasses

from jaxtyping import Bool, Int
import numpy as np


@dataclasses.dataclass(frozen=True)
class PrefixTree:
    """The distinct prefixes of some targets, each without its last token.

    Attributes:
        tokens: [M] int32, what the decoder reads at each node; parents are before their children.
        seen: [M, M] the ancestors of each node, and itself.
        nodes: [L, T] int32, the node at which each token of a target is predicted.
        targets: [L, T] int32, that token.
        written: [L, T] False behind the end of a target.
    """

    tokens: Int[np.ndarray, " m"]
    seen: Bool[np.ndarray, "m m"]
    nodes: Int[np.ndarray, "l t"]
    targets: Int[np.ndarray, "l t"]
    written: Bool[np.ndarray, "l t"]


def prefix_tree(targets: Sequence[Sequence[int]], start_id: int) -> PrefixTree:
    """The tree of some targets.

    Args:
        targets: tokens of each, with its end marker.
        start_id: the token from which a decoder starts.

    Raises:
        ValueError: there are no targets, or one has no tokens.
    """
    if not len(targets) or not all(map(len, targets)):
        raise ValueError(f"targets must have tokens, the end marker at least: {[*targets]!r:.80}")
    targets = [tuple(map(int, target)) for target in targets]
    prefixes = dict.fromkeys(target[:end] for target in targets for end in range(len(target)))
    places = {prefix: node for node, prefix in enumerate(prefixes)}
    seen = np.zeros((len(places), len(places)), bool)
    for prefix, node in places.items():
        seen[node, [places[prefix[:end]] for end in range(len(prefix) + 1)]] = True
    shape = len(targets), max(map(len, targets))
    nodes, read = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, target in enumerate(targets):
        nodes[row, : len(target)] = [places[target[:end]] for end in range(len(target))]
        read[row, : len(target)] = target
    written = np.arange(shape[1]) < np.array([[len(target)] for target in targets])
    tokens = [prefix[-1] if prefix else start_id for prefix in places]
    return PrefixTree(np.array(tokens, np.int32), seen, nodes, read, written)
