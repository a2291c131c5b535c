"""TSV and JSON of published data sets, in UTF-8: what is wrong is named with file and line."""

from collections.abc import Iterator
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


def read_tsv(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each line between tabs, without quotes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8.
    """
    for number, line in enumerate(files.lines(pathlib.Path(path).read_bytes(), path), start=1):
        if line:
            yield number, line.split("\t")
