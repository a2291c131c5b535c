"""Tables and JSON of published data sets, in UTF-8: what is wrong is named with file and line."""

from collections.abc import Iterator
import csv
import pathlib
from typing import Any

from coda_jax import files


def read_json(path: str) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, as `files.json_value` reads it.
    """
    content = pathlib.Path(path).read_bytes()
    try:
        text = files.decoded(content, path)
    except ValueError as e:
        raise ValueError(f"{path}: not JSON: {e}") from e
    try:
        return files.json_value(text)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def read_csv(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each row of a CSV file, also of the first one; [] of an empty line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not CSV.
    """
    text = files.decoded(pathlib.Path(path).read_bytes(), path)
    lines = text.removesuffix("\n").split("\n") if text else []
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as e:
        raise ValueError(f"{path}:{reader.line_num}: {e}") from e


def read_tsv(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each line between tabs, without quotes; errors as those of `read_csv`."""
    for number, line in enumerate(files.lines(pathlib.Path(path).read_bytes(), path), start=1):
        if line:
            yield number, line.split("\t")
