"""JSONL files whose lines have "inputs" and a "label": a class, or a number.

A label is a target of one number: that of its class among all, or the value itself.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from coda_jax.data import jsonl


@dataclasses.dataclass(frozen=True)
class LabelTask(jsonl.TextTask):
    """Texts with labels: the fields "inputs" and "label".

    Attributes:
        labels: names of the classes; none where labels are numbers.
    """

    labels: tuple[str, ...]

    def _read(self, columns: Mapping[str, Sequence]) -> list[dict[str, np.ndarray]]:
        pairs = zip(*(columns[key] for key in ("inputs", "label")), strict=True)
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


def read_labels(path: str | os.PathLike) -> tuple[str, ...]:
    """The classes of a file, sorted; a number that is a label is read as its text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line without a label, or with one that is no text and no whole number.
    """
    return tuple(sorted({_class(place, label) for place, _, label in _rows(path)}))


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
) -> str:
    """Returns the name of the task over these files. For gin files.

    Args:
        train_file: the file of the split "train", if there is one: JSONL with "inputs" and "label".
        validation_file: of the split "validation", if there is one.
        test_file: of the split "test", if there is one.
        vocabulary: a path, or "bytes", for `load_vocabulary`.
        labels: names of the classes; none where labels are numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file, or a bad line; file and line are named.
    """
    files = jsonl.check_files(train_file, validation_file, test_file, vocabulary)
    given = {s: os.fspath(f) for s, f in zip(jsonl.SPLITS, files, strict=True) if f is not None}
    labels = tuple(labels)
    name = jsonl.task_name("labels", given.values(), (*files, vocabulary, labels))
    if not given:
        raise ValueError(
            f"Task {name!r} needs at least one of {[f'{s}_file' for s in jsonl.SPLITS]}"
        )
    columns = {split: _columns(path, labels) for split, path in given.items()}
    task = LabelTask(name, columns, vocabulary, given, labels)
    _ = task.vocabulary  # which is loaded, or refused, here
    jsonl.TASKS[name] = task
    return name


def _columns(path: str | os.PathLike, labels: tuple[str, ...]) -> dict[str, list]:
    rows = [(text, _value(place, label, labels)) for place, text, label in _rows(path)]
    texts, values = zip(*rows, strict=True)
    return {"inputs": list(texts), "label": list(values)}


def _rows(path: str | os.PathLike):
    """(file:line, text, label) of each line."""
    for place, record in jsonl.read_records(path):
        for field in ("inputs", "label"):
            if field not in record:
                raise ValueError(f"{place}: the field {field!r} is missing")
        if not isinstance(record["inputs"], str):
            raise ValueError(f"{place}: 'inputs' must be a string: {record['inputs']!r}")
        yield place, record["inputs"], record["label"]


def _class(place: str, label: Any) -> str:
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(f"{place}: the label of a class must be a text or whole number: {label!r}")
    return str(label)


def _value(place: str, label: Any, labels: tuple[str, ...]) -> str | float:
    if labels:
        if (label := _class(place, label)) not in labels:
            raise ValueError(f"{place}: the label {label!r} is none of {labels}")
        return label
    if isinstance(label, bool) or not isinstance(label, int | float) or not np.isfinite(label):
        raise ValueError(f"{place}: the label must be a finite number: {label!r}")
    return float(label)
