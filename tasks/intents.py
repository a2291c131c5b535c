"""Sets of intents from the files that their authors published; what is wrong is named."""

from collections.abc import Callable
import functools
import os
import pathlib
from typing import Any

from coda_jax import files
from coda_jax.data.rows import cells
from coda_jax.ood.known import HeldOut, split_labels
from coda_jax.tasks import stdlib_corpus, tables

CLINC_FILE = "data_full.json"
CLINC_KEYS = {
    "train": "train",
    "validation": "val",
    "test": "test",
    "oos_train": "oos_train",
    "oos_validation": "oos_val",
    "oos_test": "oos_test",
}
BANKING_COLUMNS = ["text", "category"]
SNIPS_INTENTS = (
    "AddToPlaylist",
    "BookRestaurant",
    "GetWeather",
    "PlayMusic",
    "RateBook",
    "SearchCreativeWork",
    "SearchScreeningEvent",
)
HELD_OUT = "held_out_"  # before the name of a split

Columns = dict[str, list[str]]
Reader = Callable[[str, str], Columns]  # (directory, split) -> its columns


def without_some(read: Reader, column: str, held_out: HeldOut) -> Reader:
    """A reader of the same splits without some intents, and of "held_out_SPLIT" with them alone.

    Args:
        read: a reader.
        column: of its columns, the one with the intents.
        held_out: a share of the intents of "train", or their names: see `split_labels`.
    """

    @functools.cache
    def chosen(directory: str) -> frozenset[str]:
        known = {*read(directory, "train")[column]}
        return frozenset(split_labels([*known], held_out)[1])

    def read_some(directory: str, split: str) -> Columns:
        columns, wanted = read(directory, split.removeprefix(HELD_OUT)), split.startswith(HELD_OUT)
        found = (intent in chosen(directory) for intent in columns[column])
        kept = [row for row, is_held_out in enumerate(found) if is_held_out == wanted]
        if not kept:
            raise ValueError(f"{directory}: there is no query of the split {split!r}")
        return {name: [values[row] for row in kept] for name, values in columns.items()}

    return read_some


def read_clinc(directory: str, split: str) -> Columns:
    """Reads a split of CLINC150 from the published `data_full.json`.

    Args:
        directory: where the file lies.
        split: one of `CLINC_KEYS`; "oos_..." are the out-of-scope queries, in no other split.

    Returns:
        The columns "text" and "intent_name".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not as published; the place is named.
    """
    path, key = os.path.join(directory, CLINC_FILE), CLINC_KEYS[split]
    splits = tables.read_json(path)
    if not isinstance(splits, dict) or not isinstance(splits.get(key), list) or not splits[key]:
        raise ValueError(f"{path}: there must be a list of pairs [text, intent] under {key!r}")
    for number, pair in enumerate(splits[key]):
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair))):
            raise ValueError(f"{path}: {key}[{number}] must be [text, intent], not {pair!r}")
    texts, intents = zip(*splits[key], strict=True)
    return {"text": list(texts), "intent_name": list(intents)}


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def read_banking(directory: str, split: str) -> Columns:
    """Reads a split of Banking77 from the published `train.csv` and `test.csv`.

    There is no published validation split: it is the 10 % of train.csv that a hash of the text
    picks, and they are missing in "train".

    Args:
        directory: where the files lie.
        split: "train", "validation" or "test".

    Returns:
        The columns "text" and "category".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is not as published (file and line are named), or nothing is in the
            split.
    """
    path = os.path.join(directory, "test.csv" if split == "test" else "train.csv")
    rows = _of_split(_read_csv(path), split)
    if not rows:
        raise ValueError(f"{path}: there is no query of the split {split!r}")
    texts, categories = zip(*rows, strict=True)
    return {"text": list(texts), "category": list(categories)}


def _read_csv(path: str) -> list[list[str]]:
    """Returns the rows after the header, which must be `BANKING_COLUMNS`."""
    lines = cells(pathlib.Path(path).read_bytes(), path)
    number, header = next(lines, (0, None))
    if header != BANKING_COLUMNS:
        raise ValueError(f"{path}:{number}: the first line must be {BANKING_COLUMNS}, not {header}")
    rows = []
    for number, row in lines:
        if len(row) != len(BANKING_COLUMNS) or not all(map(_is_text, row)):
            raise ValueError(f"{path}:{number}: not a row of {BANKING_COLUMNS}: {row}")
        rows.append(row)
    return rows


def _of_split(rows: list[list[str]], split: str) -> list[list[str]]:
    """Those of a split: "validation" is the 10 % of the training rows that a hash picks."""
    if split == "test":
        return rows
    wanted = split == "validation"
    return [row for row in rows if (stdlib_corpus.split_of(row[0]) == "validation") == wanted]


def read_snips(directory: str, split: str) -> Columns:
    """Reads a split of SNIPS from the published `2017-06-custom-intent-engines`.

    Of each intent there is `INTENT/train_INTENT_full.json` and, for "test",
    `INTENT/validate_INTENT.json`. The validation split is made as Banking77's.

    Args:
        directory: that folder, with a folder for each of `SNIPS_INTENTS`.
        split: "train", "validation" or "test".

    Returns:
        The columns "text" and "intent".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is not as published (the place is named), or nothing is in the split.
    """
    rows = []
    for intent in SNIPS_INTENTS:
        name = f"validate_{intent}.json" if split == "test" else f"train_{intent}_full.json"
        rows += [[text, intent] for text in _queries(os.path.join(directory, intent, name), intent)]
    rows = _of_split(rows, split)
    if not rows:
        raise ValueError(f"{directory}: there is no query of the split {split!r}")
    texts, intents = zip(*rows, strict=True)
    return {"text": list(texts), "intent": list(intents)}


def _queries(path: str, intent: str) -> list[str]:
    """The texts of an intent's file, whose parts are joined.

    One of the published files has a character as two surrogates, each in UTF-8.
    """
    content = pathlib.Path(path).read_bytes()
    try:
        units = content.decode("utf-8", "surrogatepass").encode("utf-16-le", "surrogatepass")
        value = files.json_value(units.decode("utf-16-le"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get(intent), list):
        raise ValueError(f"{path}: there must be a list of queries under {intent!r}")
    return [_query(entry, f"{path}: {intent}[{i}]") for i, entry in enumerate(value[intent])]


def _query(entry: Any, place: str) -> str:
    parts = entry.get("data") if isinstance(entry, dict) else None
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if parts else []
    if not isinstance(parts, list) or len(texts) < len(parts) or not _are_texts(texts):
        raise ValueError(f'{place} must be {{"data": [{{"text": ...}}, ...]}}, not {entry!r:.80}')
    return "".join(texts)


def _are_texts(parts: list[Any]) -> bool:
    return all(isinstance(part, str) for part in parts) and _is_text("".join(parts))
