"""How predicted classes are compared with the true ones: precision, recall, F1, confusion.

Axis letters: C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def confusion(true: Sequence[int], predicted: Sequence[int], num_classes: int) -> np.ndarray:
    """[C, C] how many examples of a class (row) were taken for a class (column)."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (np.asarray(true, int), np.asarray(predicted, int)), 1)
    return counts


def scores(counts: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """What a confusion says of each class, and of all.

    Precision is the share of right ones among those that were taken for a class, recall that among
    the examples of it, F1 = 2 PR / (P + R); 0 where there are none.

    Args:
        counts: [C, C], see `confusion`.
        labels: names of the classes.

    Returns:
        {"precision", "recall", "f1"}: means over the classes that any example has or was taken for,
        each counted once; and "classes": {label: the same and the number of "examples"}.
    """
    right = np.diag(counts).astype(float)
    taken, there = counts.sum(0), counts.sum(1)
    values = {
        "precision": right / np.maximum(taken, 1),
        "recall": right / np.maximum(there, 1),
        "f1": 2 * right / np.maximum(taken + there, 1),
    }
    seen = (taken + there) > 0
    means = {name: float(of_class[seen].mean()) for name, of_class in values.items()}
    classes = {
        label: {name: float(x[i]) for name, x in values.items()} | {"examples": int(there[i])}
        for i, label in enumerate(labels)
    }
    return {**means, "classes": classes}
