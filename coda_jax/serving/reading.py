"""The body of a request to rows, and rows to the inputs of a model; what is wrong is refused.

A body is a JSON object with the fields of a row of `coda predict`. A list in the place of a value
has one for each row; what is no list, all rows have:

    {"inputs": ["an article", "another one"], "adapter": "titles"}

An image or a recording is not a file's name but the file itself, in base64.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import json
import os
import re
import tempfile
from typing import Any, NamedTuple

import numpy as np

from coda_jax import files
from coda_jax.adapters import unknown
from coda_jax.data.examples import Expected, input_problem
from coda_jax.models import Inputs

ADAPTER, STREAM = "adapter", "stream"
# As browsers, and clients of vLLM, write a file.
_DATA_URL = re.compile(r"data:[\w.+/;=-]*;base64,")


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        why: a sentence.
    """

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status, self.why = status, why


class Asked(NamedTuple):
    """What a body asks for.

    Attributes:
        rows: fields of each.
        adapters: the name of each row's adapter, None without adapters.
        streams: whether answers are sent as they come.
    """

    rows: list[dict[str, str]]
    adapters: list[str | None]
    streams: bool


class Reader:
    """Reads requests for one model.

    Args:
        inputs: those of its family.
        encode: (row) -> its inputs [n, ...].
        expects: what the model takes.
        longest: the longest input.
        adapters: names that a row chooses from; None where it names none.
        max_rows: the most rows of a body.
    """

    def __init__(
        self,
        inputs: Inputs,
        encode: Callable[[Mapping[str, str]], np.ndarray],
        expects: Expected,
        longest: int,
        adapters: Sequence[str] | None,
        max_rows: int,
    ):
        self._inputs, self._encode, self._expects = inputs, encode, expects
        self._longest, self._adapters, self._max_rows = longest, adapters, max_rows
        self._fields = (inputs.field, *inputs.others, *[ADAPTER] * (adapters is not None))

    def asked(self, content: bytes) -> Asked:
        """The rows of a body.

        Raises:
            Refused: it is no such object, or has too many rows; or there is no such adapter.
        """
        fields = dict(_parsed(content))
        streams = fields.pop(STREAM, False)
        if not isinstance(streams, bool):
            raise Refused(400, f"{STREAM!r} must be true or false, got {streams!r:.80}")
        self._check_fields(fields)
        rows = self._rows(fields)
        names = [row.pop(ADAPTER, None) for row in rows]
        if self._adapters is not None:
            for number, name in enumerate(names):
                if (why := unknown(name, self._adapters)) is not None:
                    raise Refused(404, _of(number, rows, why))
        for number, row in enumerate(rows):
            if (why := self._inputs.problem(row)) is not None:
                raise Refused(400, _of(number, rows, why))
        return Asked(rows, names, streams)

    def inputs(self, rows: Sequence[Mapping[str, str]]) -> list[np.ndarray]:
        """The inputs [n, ...] of each row.

        Raises:
            Refused: a row cannot be read, is longer than the longest, or is nothing for the model.
        """
        found = []
        for number, row in enumerate(rows):
            try:
                values = self._read(row) if self._inputs.reads_files else self._encode(row)
                found.append(self._checked(values))
            except Refused as refused:
                raise Refused(refused.status, _of(number, rows, refused.why)) from refused
        return found

    def _check_fields(self, fields: Mapping[str, Any]) -> None:
        known = ", ".join(map(repr, (*self._fields, STREAM)))
        for name in fields:
            if name == ADAPTER and name not in self._fields:
                raise Refused(404, f"{name!r}: this server has no adapters to choose from")
            if name not in self._fields:
                raise Refused(400, f"{name!r:.80} is no field of a request; there are {known}")
        for name in (self._inputs.field, *[ADAPTER] * (self._adapters is not None)):
            if name not in fields:
                raise Refused(400, f"the field {name!r} is missing; there are {known}")

    def _rows(self, fields: Mapping[str, Any]) -> list[dict[str, str]]:
        counts = {name: len(x) for name, x in fields.items() if isinstance(x, list)}
        if len({*counts.values()}) > 1:
            raise Refused(400, f"the lists have different numbers of entries: {counts}")
        count = next(iter(counts.values()), 1)
        if not count:
            raise Refused(400, f"{next(iter(counts))!r} is empty: there is nothing to answer")
        if count > self._max_rows:
            raise Refused(413, f"{count:,} rows in a request; MAX_ROWS is {self._max_rows:,}")
        rows: list[dict[str, str]] = [{} for _ in range(count)]
        for name, values in fields.items():
            given = values if isinstance(values, list) else [values] * count
            for number, (row, value) in enumerate(zip(rows, given, strict=True)):
                if not isinstance(value, str):
                    why = f"{name!r} must be a text, got {json.dumps(value):.80}"
                    raise Refused(400, _of(number, rows, why))
                row[name] = value
        return rows

    def _read(self, row: Mapping[str, str]) -> np.ndarray:
        """The inputs of a row whose field has a file in base64."""
        field = self._inputs.field
        text = row[field]
        start = _DATA_URL.match(text)
        try:
            content = base64.b64decode(text[start.end() if start else 0 :], validate=True)
        except ValueError as error:
            why = f"{field!r} must be the content of a file in base64: {error}"
            raise Refused(400, why) from error
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, field)
            with open(path, "wb") as file:
                file.write(content)
            try:
                return self._encode({**row, field: path})
            except ValueError as error:
                why = str(error).replace(repr(path), f"{field!r}").replace(path, field)
                raise Refused(422, why) from error

    def _checked(self, values: np.ndarray) -> np.ndarray:
        if len(values) > self._longest:
            unit = self._inputs.unit
            raise Refused(413, f"it has {len(values):,} {unit}, at most {self._longest:,} are read")
        if (why := input_problem(values, self._expects)) is not None:
            raise Refused(422, why)
        return values


def _parsed(content: bytes) -> Mapping[str, Any]:
    if not content:
        raise Refused(400, "the body is empty: send a JSON object")
    try:
        return files.parse_json(content, "the body")
    except ValueError as error:
        raise Refused(400, str(error)) from error


def _of(number: int, rows: Sequence, why: str) -> str:
    """A sentence on one of several rows."""
    return f"row {number} (the first is 0): {why}" if len(rows) > 1 else why
