"""JSONL files: their texts, and tasks over them that need neither seqio nor TensorFlow.

`jsonl_task` reads the files and keeps the task in `TASKS` under the name that it returns. Where
seqio is in use, seqio knows the task by the same name.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import sys
from typing import Any

import numpy as np

from coda_jax import checks, files
from coda_jax.data.batches import FEATURES
from coda_jax.data.scores import accuracy
from coda_jax.data.vocabularies import Vocabulary, load_vocabulary

Columns = Mapping[str, Sequence[str]]
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class TextTask:
    """What tasks over JSONL files share: their texts by split, and the vocabulary.

    Attributes:
        name: of the task.
        columns: for each split, lists by the name of a field.
        vocabulary_path: a path, or "bytes", for `load_vocabulary`.
        files: the file of each split.
    """

    name: str
    columns: Mapping[str, Mapping[str, Sequence]] = dataclasses.field(repr=False)
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
        """The lines, from 0, whose targets the vocabulary gives back as another text."""
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
        """The lines, from 0, whose targets the vocabulary gives back as another text."""
        pairs = zip(self.columns[split]["targets"], self.examples(split), strict=True)
        return [
            line
            for line, (text, example) in enumerate(pairs)
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
        train_file: the file of the split "train", if there is one; see `read_splits`.
        validation_file: the file of the split "validation", if there is one.
        test_file: the file of the split "test", if there is one.
        vocabulary: a path, or "bytes", for `load_vocabulary`.
        fields: the names of a line's fields, that of the inputs and that of the targets.

    Returns:
        "jsonl_<names of the files>"; see `task_name`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as for `read_splits`, or `load_vocabulary` refuses the vocabulary.
    """
    files = check_files(train_file, validation_file, test_file, vocabulary)
    fields = tuple(
        checks.text(name, field)
        for name, field in zip(("INPUT_FIELD", "TARGET_FIELD"), fields, strict=True)
    )
    if len({*fields}) < 2:
        raise ValueError(f"INPUT_FIELD and TARGET_FIELD are both {fields[0]!r}")
    name = task_name("jsonl", files, (files, vocabulary, fields))
    if (task := TASKS.get(name)) is None:
        given = {s: os.fspath(f) for s, f in zip(SPLITS, files, strict=True) if f is not None}
        task = JsonlTask(name, read_splits(name, *files, fields=fields), vocabulary, given)
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
    files: Sequence[str | os.PathLike | None],
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
) -> tuple[Any, Any, Any]:
    """The files of the splits; ValueError where one, or the vocabulary, is no name of a file."""
    files = train_file, validation_file, test_file
    names = [f"{split.upper()}_FILE" for split in SPLITS]
    checks.paths(**dict(zip(names, files, strict=True)), VOCABULARY=vocabulary)
    return files


def read_splits(
    name: str,
    train_file: str | os.PathLike | None,
    validation_file: str | os.PathLike | None,
    test_file: str | os.PathLike | None,
    fields: Sequence[str] = FEATURES,
) -> dict[str, Columns]:
    """Reads JSONL files with lines {"inputs": str, "targets": str}.

    Other fields of a line are ignored; blank lines are allowed at the end only.

    Args:
        name: of the task, for the error.
        train_file: the file of the split "train", if there is one.
        validation_file: the file of the split "validation", if there is one.
        test_file: the file of the split "test", if there is one.
        fields: what the two fields of a line are called.

    Returns:
        The lists "inputs" and "targets" of each split that has a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file, an empty file, or a bad line (file and line are named).
    """
    files = dict(zip(SPLITS, (train_file, validation_file, test_file), strict=True))
    columns = {
        split: dict(zip(FEATURES, read_jsonl(path, fields).values(), strict=True))
        for split, path in files.items()
        if path is not None
    }
    if not columns:
        raise ValueError(f"Task {name!r} needs at least one of {[f'{s}_file' for s in files]}")
    return columns


def read_jsonl(
    path: str | os.PathLike, fields: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Reads some text fields of a JSONL file.

    Args:
        path: the file, UTF-8.
        fields: what each line must have, as strings.
        optional: what a line may lack, "" then.

    Returns:
        A list for each field, in the order of the lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty file, or a line that is not such an object; file and line are named.
    """
    columns: dict[str, list[str]] = {field: [] for field in (*fields, *optional)}
    for place, record in read_records(path):
        record = {**dict.fromkeys(optional, ""), **record}
        for field in columns:
            if field not in record:
                raise ValueError(f"{place}: the field {field!r} is missing")
            if not isinstance(record[field], str):
                raise ValueError(f"{place}: {field!r} must be a string: {record[field]!r}")
            columns[field].append(record[field])
    return columns


def read_records(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with "file:line" for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty file, or a line that is no object; file and line are named.
    """
    with open(path, "rb") as f:
        lines = f.read().rstrip().split(b"\n")
    if lines == [b""]:
        raise ValueError(f"{os.fspath(path)}: the file is empty")
    for number, line in enumerate(lines, start=1):
        yield f"{os.fspath(path)}:{number}", _record(line, os.fspath(path), number)


def _record(line: bytes, path: str, number: int) -> dict[str, Any]:
    """The object in a line; ValueError names the file and the line."""
    place, text = f"{path}:{number}", files.decoded(line, path, number)
    try:
        record = files.json_value(text)
    except ValueError as e:
        raise ValueError(f"{place}: {e} (each line must be an object)") from e
    if not isinstance(record, dict):
        raise ValueError(f"{place}: not an object: {record!r:.80}")
    return record


def read_inputs(path: str | os.PathLike) -> list[str]:
    """Reads the inputs to predict from.

    Args:
        path: a text file with one input a line, see `files.lines`; a .jsonl file with lines
            {"inputs": str}; or "-" for text on standard input.

    Returns:
        The inputs in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no input, a line that is not UTF-8, or a bad JSONL line (file and line
            are named).
    """
    path = os.fspath(path)
    if path.endswith(".jsonl"):
        return read_jsonl(path, ("inputs",))["inputs"]
    place = path if path != "-" else "standard input"
    content = _standard_input() if path == "-" else pathlib.Path(path).read_bytes()
    if not (lines := files.lines(content, place)):
        raise ValueError(f"{place}: there are no inputs")
    return lines


def _standard_input() -> bytes:
    """All of it; what a program has put in its place may be text alone."""
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode() if buffer is None else buffer.read()
