"""Rows of JSONL, CSV and TSV files: what reads them, what is taken of them, what writes them.

The end of a file's name tells a CSV and a TSV, whose first line names their fields and whose values
are texts. Blank lines are allowed at the end of a file only.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
import string
import sys
import types
from typing import Any, NamedTuple

from coda_jax import checks, files

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_READ_AT_ONCE = 2**20  # bytes of standard input


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        path: of the file.
        line: on which the row starts, from 1.
        fields: {name: value}.
    """

    path: str
    line: int
    fields: Mapping[str, Any]

    @property
    def place(self) -> str:
        """File and line, for errors."""
        return f"{self.path}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Field:
    """What is taken of a row: one of its fields, or a text that is made of several.

    Attributes:
        given: the name of a field; or, with braces, a text with names in them, such as "question:
            {question} context: {context}", in which braces of its own are doubled.
        option: as which it was given, for errors.

    Raises:
        ValueError: there is anything but names in the braces, or nothing.
    """

    given: str
    option: str = "a field"

    def __post_init__(self):
        checks.text(self.option, self.given)
        _ = self._parts

    @functools.cached_property
    def _parts(self) -> list[tuple[str, str | None]] | None:
        """[(text, name of the field behind it)] of a template, None for a name alone."""
        if not {"{", "}"} & {*self.given}:
            return None
        said = f"{self.option}={self.given!r}"
        try:
            parts = [*string.Formatter().parse(self.given)]
        except ValueError as error:
            raise ValueError(f"{said}: {error}; a brace of the text is written twice") from error
        for _, name, *rest in parts:
            if name is not None and (not name or any(rest) or {*".[]"} & {*name}):
                raise ValueError(f"{said} must have nothing but names of fields in its braces")
        if all(name is None for _, name, *_ in parts):
            raise ValueError(f"{said} names no field")
        return [(text, name) for text, name, *_ in parts]

    def value(self, row: Row) -> Any:
        """The value of the field, or the text; ValueError names the row that lacks it."""
        return self._value(row, self.given) if self._parts is None else self.text(row)

    def text(self, row: Row) -> str:
        """The same, where it must be a text."""
        if self._parts is None:
            return self._text(row, self.given)
        return "".join(t if name is None else t + self._text(row, name) for t, name in self._parts)

    def _value(self, row: Row, name: str) -> Any:
        if name not in row.fields:
            raise ValueError(
                f"{row.place}: the field {name!r} is missing, there are only {[*row.fields]}; "
                f"{self.option} says which is read"
            )
        return row.fields[name]

    def _text(self, row: Row, name: str) -> str:
        if not isinstance(value := self._value(row, name), str):
            raise ValueError(f"{row.place}: {name!r} must be a string: {value!r}")
        return value


def read_rows(path: str | os.PathLike) -> Iterator[Row]:
    """The rows of a CSV or TSV file, or else of JSONL, in UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty file, or a row that is none; file and line are named.
    """
    path, content = os.fspath(path), pathlib.Path(path).read_bytes()
    if not content.strip():
        raise ValueError(f"{path}: the file is empty")
    delimiter = _delimiter(path)
    return _objects(content, path) if delimiter is None else _table(content, path, delimiter)


def _delimiter(path: str) -> str | None:
    """What stands between the values of a file's lines; None for JSONL."""
    return _DELIMITERS.get(pathlib.Path(path).suffix.lower())


def _objects(content: bytes, path: str) -> Iterator[Row]:
    for number, line in enumerate(content.rstrip().split(b"\n"), start=1):
        text = files.decoded(line, path, number)
        try:
            record = files.json_value(text)
        except ValueError as e:
            raise ValueError(f"{path}:{number}: {e} (each line must be an object)") from e
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: not an object: {record!r:.80}")
        yield Row(path, number, record)


def _table(content: bytes, path: str, delimiter: str) -> Iterator[Row]:
    rows = [*cells(content, path, delimiter)]
    while rows and not rows[-1][1]:
        rows.pop()
    if len(rows) < 2:
        raise ValueError(f"{path}: there are no rows below the names of the columns")
    _, names = rows[0]
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise ValueError(f"{path}:1: several columns are called {twice[0]!r}")
    for line, values in rows[1:]:
        if len(values) != len(names):
            raise ValueError(f"{path}:{line}: {len(values)} values, not {len(names)}: {names}")
        yield Row(path, line, dict(zip(names, values, strict=True)))


def cells(content: bytes, path: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """(line on which it starts, values) of each row of a table, also of the first; [] of no text.

    Raises:
        ValueError: it is not UTF-8, or its quotes do not match; file and line are named.
    """
    text = files.decoded(content, path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = rows.line_num + 1
        try:
            values = next(rows, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line}: {error}: a value that begins with a quote must end with one, and "
                "quotes within it are doubled"
            ) from error
        if values is None:
            return
        yield line, values


def read_requests(
    path: str,
    name: str,
    field: str | None = None,
    problem: Callable[[Mapping[str, Any]], str | None] = lambda request: None,
) -> Iterator[list[dict[str, Any]]]:
    """What is asked of a model: a row's fields, and its input under a name.

    Args:
        path: a JSONL, CSV or TSV file by its name; any other is a text with one input a line, see
            `files.lines`; or "-" for such lines on standard input.
        name: of the input.
        field: see `Field.given`; None for the name itself.
        problem: (request) -> why it is none; None where it is.

    Yields:
        Those of a file together, those of standard input as they come.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is none, or a bad one (file and line are named).
    """
    path = os.fspath(path)
    has_fields = path.lower().endswith((".jsonl", *_DELIMITERS))
    if field is not None and not has_fields:
        raise ValueError(f"INPUT_FIELD={field!r} has no effect: lines of text have no fields")
    taken = Field(name if field is None else field, "INPUT_FIELD")
    for rows in [read_rows(path)] if has_fields else _lines(path, name):
        requests = []
        for row in rows:
            request = {**row.fields, name: taken.text(row)}
            if (why := problem(request)) is not None:
                raise ValueError(f"{row.place}: {why}")
            requests.append(request)
        yield requests


def _lines(path: str, name: str) -> Iterator[list[Row]]:
    """The lines of a text, {name: line}: all of a file, those of standard input that have come."""
    place = path if path != "-" else "standard input"
    number = 1
    for content in [pathlib.Path(path).read_bytes()] if path != "-" else _arriving():
        lines = files.lines(content, place, number)
        yield [Row(place, i, {name: line}) for i, line in enumerate(lines, start=number)]
        number += len(lines)
    if number == 1:
        raise ValueError(f"{place}: there are no inputs")


def _arriving() -> Iterator[bytes]:
    """Whole lines of standard input, all that have come; what is in its place may have no bytes."""
    buffer, rest = getattr(sys.stdin, "buffer", None), b""

    def read() -> bytes:
        return buffer.read1(_READ_AT_ONCE) if buffer else sys.stdin.readline().encode()

    while part := read():
        whole, end, rest = (rest + part).rpartition(b"\n")
        if end:
            yield whole + end
    if rest:
        yield rest


def written(rows: Iterable[Mapping[str, Any]], path: str) -> Iterator[str]:
    """The text of rows, one by one, as a file of this name has them: CSV, TSV, or else JSONL.

    The columns of a table are the fields of the first row; what is no text is written as JSON.

    Raises:
        ValueError: a row of a table has a field that the first has not.
    """
    if (delimiter := _delimiter(path)) is None:
        yield from (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    as_text = csv.writer(types.SimpleNamespace(write=str), delimiter=delimiter).writerow
    names: list[str] | None = None
    for number, row in enumerate(rows, start=1):
        if names is None:
            names = [*row]
            yield _ended(as_text(names))
        if more := [name for name in row if name not in names]:
            raise ValueError(
                f"{path}: row {number} has the field {more[0]!r}, the first has only {names}: "
                "a name that ends with .jsonl takes both"
            )
        values = (row.get(name, "") for name in names)
        texts = (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in values)
        yield _ended(as_text(texts))


def _ended(line: str) -> str:
    """A line with an end of ours: csv quotes only what its own line ends are made of."""
    return line.removesuffix("\r\n") + "\n"
