"""Tasks over files of JSONL, CSV or TSV that need neither seqio nor TensorFlow.

`jsonl_task` reads the files and keeps the task in `TASKS` under the name that it returns. Where
seqio is in use, seqio knows the task by the same name.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import sys
from typing import Any

import numpy as np

from coda_jax import checks
from coda_jax.data.batches import FEATURES
from coda_jax.data.rows import Field, Row, read_rows
from coda_jax.data.scores import accuracy
from coda_jax.data.vocabularies import Vocabulary, load_vocabulary

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class TextTask:
    """What tasks over files share: their texts by split, and the vocabulary.

    Attributes:
        name: of the task.
        columns: for each split, lists by the name of a field.
        lines: for each split, on which line of its file each example starts.
        vocabulary_path: a path, or "bytes", for `load_vocabulary`.
        files: the file of each split.
    """

    name: str
    columns: Mapping[str, Mapping[str, Sequence]] = dataclasses.field(repr=False)
    lines: Mapping[str, Sequence[int]] = dataclasses.field(repr=False)
    vocabulary_path: str
    files: Mapping[str, str]

    @property
    def splits(self) -> list[str]:
        """The splits that have a file."""
        return sorted(self.columns)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, which is loaded when it is first used."""
        return load_vocabulary(self.vocabulary_path)

    def check_split(self, split: str) -> None:
        """Raises ValueError where there is no such split."""
        if split not in self.columns:
            raise ValueError(f"{self.name} has no split {split!r}, only {self.splits}")

    def tokens(self, text: str) -> np.ndarray:
        """The ids of a text with EOS at the end, int32."""
        return np.array([*self.vocabulary.encode(text), self.vocabulary.eos_id], np.int32)

    @functools.cached_property
    def _examples(self) -> dict[str, list[dict[str, np.ndarray]]]:
        return {}

    def examples(self, split: str) -> list[dict[str, np.ndarray]]:
        """{"inputs", "targets"} of each line; the inputs are int32 tokens with EOS at the end.

        Raises:
            ValueError: there is no such split.
        """
        self.check_split(split)
        if split not in self._examples:
            self._examples[split] = self._read(self.columns[split])
        return self._examples[split]

    def _read(self, columns: Mapping[str, Sequence]) -> list[dict[str, np.ndarray]]:
        """The examples of a split's columns."""
        raise NotImplementedError

    def changed_targets(self, split: str) -> list[int]:
        """The examples, from 0, whose targets the vocabulary gives back as another text."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class JsonlTask(TextTask):
    """Pairs of texts: the fields "inputs" and "targets"; both are tokens with EOS at the end."""

    def _read(self, columns: Mapping[str, Sequence]) -> list[dict[str, np.ndarray]]:
        pairs = zip(*(columns[key] for key in FEATURES), strict=True)
        return [
            {key: self.tokens(text) for key, text in zip(FEATURES, pair, strict=True)}
            for pair in pairs
        ]

    def metrics(self, split: str, outputs: Sequence[Sequence[int]]) -> dict[str, float]:
        """The accuracy of the outputs, tokens, for all lines of a split."""
        texts = [self.vocabulary.decode(tokens).strip() for tokens in outputs]
        return accuracy([text.strip() for text in self.columns[split]["targets"]], texts)

    def changed_targets(self, split: str) -> list[int]:
        """The examples, from 0, whose targets the vocabulary gives back as another text."""
        pairs = zip(self.columns[split]["targets"], self.examples(split), strict=True)
        return [
            place
            for place, (text, example) in enumerate(pairs)
            if self.vocabulary.decode(example["targets"].tolist()).strip() != text.strip()
        ]


TASKS: dict[str, TextTask] = {}  # by name
_NAMED: dict[str, str] = {}  # the arguments of the tasks that were named here


def jsonl_task(
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    vocabulary: str,
    fields: Sequence[str] = FEATURES,
) -> str:
    """Returns the name of the task over these files. For gin files.

    The files and the vocabulary are read at once, so that a bad line is found before anything runs.

    Args:
        train_file: the file of the split "train", if there is one: JSONL, CSV or TSV, see `rows`.
        validation_file: the file of the split "validation", if there is one.
        test_file: the file of the split "test", if there is one.
        vocabulary: a path, or "bytes", for `load_vocabulary`.
        fields: what of a row are the inputs, and what the targets; see `rows.Field`.

    Returns:
        "jsonl_<names of the files>"; see `task_name`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file, an empty file, a bad row (file and line are named), or a bad
            vocabulary.
    """
    given = check_files(train_file, validation_file, test_file, vocabulary)
    inputs, targets = check_fields(fields)
    name = task_name("jsonl", given.values(), (given, vocabulary, inputs, targets))
    if (task := TASKS.get(name)) is None:
        read = dict(zip(FEATURES, (inputs.text, targets.text), strict=True))
        task = JsonlTask(name, *read_splits(given, read), vocabulary, given)
    # T5X finds tasks in seqio's registry. Only seqio reads a vocabulary in a bucket.
    if sys.modules.get("seqio"):
        from coda_jax.data import seqio_tasks

        seqio_tasks.add_loaded_task(task)
    else:
        _ = task.vocabulary  # which is loaded, or refused, here
    TASKS[name] = task
    return name


def task_name(
    prefix: str,
    files: Iterable[str | os.PathLike | None],
    arguments: Sequence,
    taken: Container[str] = (),
) -> str:
    """The name of a task that is made for some arguments; the same ones give the same name.

    Args:
        prefix: how it begins.
        files: what it is named after; None is left out.
        arguments: whatever makes the task another one.
        taken: names that have another meaning.

    Returns:
        "<prefix>_<names of the files>", with a number behind it where another task has that name.
    """
    stems = [pathlib.Path(file).stem for file in files if file is not None]
    first = name = re.sub(r"\W", "_", "_".join([prefix, *stems]))
    arguments = repr(arguments)
    for number in itertools.count(2):
        known = _NAMED.get(name)
        if known == arguments or (known is None and name not in taken):
            _NAMED[name] = arguments
            return name
        name = f"{first}_{number}"


def check_files(
    train_file: Any, validation_file: Any, test_file: Any, vocabulary: Any
) -> dict[str, str]:
    """{split: its file} of those that are given.

    Raises:
        ValueError: there is none, or one, or the vocabulary, is no name of a file.
    """
    files = dict(zip(SPLITS, (train_file, validation_file, test_file), strict=True))
    names = {f"{split.upper()}_FILE": file for split, file in files.items()}
    checks.paths(**names, VOCABULARY=vocabulary)
    if not (given := {s: os.fspath(file) for s, file in files.items() if file is not None}):
        raise ValueError(f"the task needs at least one of {', '.join(names)}")
    return given


def check_fields(fields: Sequence[str]) -> tuple[Field, Field]:
    """What is taken of each row as its inputs, and as its targets; ValueError where it is one."""
    names = ("INPUT_FIELD", "TARGET_FIELD")
    inputs, targets = (Field(given, name) for name, given in zip(names, fields, strict=True))
    if inputs.given == targets.given:
        raise ValueError(f"INPUT_FIELD and TARGET_FIELD are both {inputs.given!r}")
    return inputs, targets


def read_splits(
    given: Mapping[str, str], read: Mapping[str, Callable[[Row], Any]]
) -> tuple[dict[str, dict[str, list]], dict[str, list[int]]]:
    """Reads the files of splits.

    Args:
        given: {split: its file}.
        read: {name of a column: (row) -> its value}.

    Returns:
        The columns of each split, and the lines on which its rows start.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty file, or a bad row; file and line are named.
    """
    columns, lines = {}, {}
    for split, path in given.items():
        found = [(row.line, *(take(row) for take in read.values())) for row in read_rows(path)]
        lines[split], *values = map(list, zip(*found, strict=True))
        columns[split] = dict(zip(read, values, strict=True))
    return columns, lines
