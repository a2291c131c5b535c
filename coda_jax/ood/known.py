"""Which labels of a task a model knows, and which are held out."""

from collections.abc import Sequence
import difflib

import numpy as np

from coda_jax import checks

MOST = 2000  # labels: what has more is no classification
HeldOut = float | Sequence[str] | None

_SHARE = checks.Number(above=0, below=1)
_NAMES = checks.Each(checks.text, least=1)


def split_labels(
    labels: Sequence[str], held_out: HeldOut = None, seed: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the labels that are known, those that are held out), each sorted.

    Args:
        labels: of the training examples, each once, in any order.
        held_out: a share of them, which is drawn; or their names; None for none.
        seed: of the draw: the same share, seed and labels give the same ones.

    Raises:
        ValueError: a name is none of the labels; fewer than two are known, or none is held out;
            there are more than `MOST`.
    """
    labels = tuple(sorted(labels))
    if len(labels) > MOST:
        raise ValueError(
            f"the training examples have {len(labels):,} different targets, more than {MOST:,}: "
            "these are no labels"
        )
    chosen: tuple[str, ...] = ()
    if isinstance(held_out, str | tuple | list):
        chosen = tuple(sorted({*_NAMES("HELD_OUT", held_out)}))
    elif held_out is not None:
        count = round(_SHARE("HELD_OUT", held_out) * len(labels))
        order = np.random.default_rng(checks.SEED("SEED", seed)).permutation(len(labels))
        chosen = tuple(labels[i] for i in sorted(order[:count]))
    if unknown := [label for label in chosen if label not in labels]:
        near = difflib.get_close_matches(unknown[0], labels) or labels[:3]
        raise ValueError(
            f"HELD_OUT: the task has no label {unknown[0]!r}; the nearest are {[*near]}"
        )
    known = tuple(label for label in labels if label not in chosen)
    if len(known) < 2 or (held_out is not None and not chosen):
        raise ValueError(
            f"HELD_OUT={held_out!r} leaves {len(known)} of {len(labels)} labels and holds "
            f"{len(chosen)} out: at least two must be left, and one held out"
        )
    return known, chosen
