"""Files of JSONL, CSV or TSV whose rows have a text and a label: a class, or a number.

A label is a target of one number: that of its class among all, or the value itself.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import os
from typing import Any

import numpy as np

from coda_jax.data import jsonl, rows

LABEL = "label"  # the field of a row, unless another is named


@dataclasses.dataclass(frozen=True)
class LabelTask(jsonl.TextTask):
    """Texts with labels: the columns "inputs" and "label".

    Attributes:
        labels: names of the classes; none where labels are numbers.
    """

    labels: tuple[str, ...]

    def _read(self, columns: Mapping[str, Sequence]) -> list[dict[str, np.ndarray]]:
        pairs = zip(columns["inputs"], columns[LABEL], strict=True)
        return [
            {"inputs": self.tokens(text), "targets": self._target(label)} for text, label in pairs
        ]

    def changed_targets(self, split: str) -> list[int]:
        """None: a label is not written."""
        del split
        return []

    def _target(self, label: Any) -> np.ndarray:
        if not self.labels:
            return np.array([label], np.float32)
        return np.array([self.labels.index(label)], np.int32)


def read_labels(path: str | os.PathLike, field: str = LABEL) -> tuple[str, ...]:
    """The classes of a file, sorted; a number that is a label is read as its text.

    Args:
        path: of the file.
        field: what of a row is its label; see `rows.Field`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line without a label, or with one that is no text and no whole number.
    """
    label = rows.Field(field, "TARGET_FIELD")
    return tuple(sorted({_class(row, label.value(row)) for row in rows.read_rows(path)}))


def check_labels(task: str | None, described: bool) -> None:
    """Raises ValueError where a model with a head for labels is given texts, or the reverse.

    Args:
        task: what is given.
        described: whether the model has a head.
    """
    if described and not isinstance(jsonl.TASKS.get(task), LabelTask):
        raise ValueError(
            f"the model answers with labels or numbers, and {task or 'the cache file'} has texts: "
            "use tasks/labels.gin"
        )
    if not described and isinstance(jsonl.TASKS.get(task), LabelTask):
        raise ValueError(f"the model answers with texts, and {task} has labels or numbers")


def labelled_task(
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    vocabulary: str,
    labels: Sequence[str],
    fields: Sequence[str] = ("inputs", LABEL),
) -> str:
    """Returns the name of the task over these files. For gin files.

    Args:
        train_file: the file of the split "train", if there is one: JSONL, CSV or TSV, see `rows`.
        validation_file: of the split "validation", if there is one.
        test_file: of the split "test", if there is one.
        vocabulary: a path, or "bytes", for `load_vocabulary`.
        labels: names of the classes; none where labels are numbers.
        fields: what of a row are the inputs, and what the label; see `rows.Field`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file, or a bad row; file and line are named.
    """
    given = jsonl.check_files(train_file, validation_file, test_file, vocabulary)
    inputs, label = jsonl.check_fields(fields)
    labels = tuple(labels)
    arguments = given, vocabulary, labels, inputs, label
    name = jsonl.task_name("labels", given.values(), arguments)
    read = {"inputs": inputs.text, LABEL: lambda row: _value(row, label.value(row), labels)}
    task = LabelTask(name, *jsonl.read_splits(given, read), vocabulary, given, labels)
    _ = task.vocabulary  # which is loaded, or refused, here
    jsonl.TASKS[name] = task
    return name


def _class(row: rows.Row, label: Any) -> str:
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(
            f"{row.place}: the label of a class must be a text or whole number: {label!r}"
        )
    return str(label)


def _value(row: rows.Row, label: Any, labels: tuple[str, ...]) -> str | float:
    if labels:
        if (label := _class(row, label)) not in labels:
            raise ValueError(f"{row.place}: the label {label!r} is none of {labels}")
        return label
    number = None
    if isinstance(label, str | int | float) and not isinstance(label, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(label)  # CSV has numbers as texts
    if number is None or not np.isfinite(number):
        raise ValueError(f"{row.place}: the label must be a finite number: {label!r}")
    return number
