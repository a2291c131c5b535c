"""The cache file: the tokenised examples of a task in one npz file. Needs numpy only.

For each of "inputs" and "targets" it holds the examples one after the other and the offsets where
they start; beside them, as JSON, what the examples are.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import os
import zipfile
import zlib

import numpy as np

from coda_jax.data.batches import FEATURES, Example, as_feature
from coda_jax.files import atomic

CACHE_FORMAT = "coda_jax examples 1"


class CachedExamples(Sequence[dict[str, np.ndarray]]):
    """The examples of a cache file: [i] gives {"inputs", "targets"}."""

    def __init__(self, tokens: Mapping[str, np.ndarray], offsets: Mapping[str, np.ndarray]):
        self._tokens = tokens
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets["inputs"]) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        i = range(len(self))[index]
        return {
            key: self._tokens[key][self._offsets[key][i] : self._offsets[key][i + 1]]
            for key in FEATURES
        }


def write_cache(path: str | os.PathLike, examples: Iterable[Example], metadata: Mapping) -> int:
    """Writes examples to one npz file, which appears only when it is complete.

    Args:
        path: the file.
        examples: dicts of "inputs" and "targets", tokens or vectors.
        metadata: what `read_cache` gives back; anything that JSON can hold.

    Returns:
        The number of examples.

    Raises:
        ValueError: there are no examples.
        TypeError: the metadata do not fit into JSON.
    """
    arrays = {"metadata": np.array(json.dumps({"format": CACHE_FORMAT, **metadata}))}
    parts: dict[str, list[np.ndarray]] = {key: [] for key in FEATURES}
    for example in examples:
        for key in FEATURES:
            parts[key].append(as_feature(example[key]))
    if not parts["inputs"]:
        raise ValueError(f"No examples to write to {os.fspath(path)!r}")
    for key in FEATURES:
        arrays[f"{key}_tokens"] = np.concatenate(parts[key])
        arrays[f"{key}_offsets"] = np.cumsum([0, *map(len, parts[key])], dtype=np.int64)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return len(parts["inputs"])


def read_cache(path: str | os.PathLike) -> tuple[CachedExamples, dict]:
    """Reads a file of `write_cache`.

    Args:
        path: the file.

    Returns:
        The examples, with `len` and [i], and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or something else; the message says what is missing.
    """
    arrays = _read_arrays(path)
    names = ["metadata", *(f"{key}_{part}" for key in FEATURES for part in ("tokens", "offsets"))]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"{os.fspath(path)!r} is not a cache of examples: it lacks {missing}")
    try:
        metadata = json.loads(str(arrays["metadata"]))
        file_format = metadata.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{os.fspath(path)!r}: metadata without a format ({e})") from e
    if file_format != CACHE_FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} has the format {file_format!r}, not {CACHE_FORMAT!r}"
        )
    tokens = {key: arrays[f"{key}_tokens"] for key in FEATURES}
    offsets = {key: arrays[f"{key}_offsets"] for key in FEATURES}
    _check_offsets(path, tokens, offsets)
    return CachedExamples(tokens, offsets), metadata


def _read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive")
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError) as e:
        raise ValueError(f"{os.fspath(path)!r} is not a readable npz file: {e}") from e


def _check_offsets(path, tokens, offsets) -> None:
    for key in FEATURES:
        o = offsets[key]
        if o.ndim != 1 or not len(o) or o[0] != 0 or (np.diff(o) < 0).any():
            raise ValueError(f"{os.fspath(path)!r}: {key}_offsets do not rise from 0")
        if tokens[key].ndim not in (1, 2) or o[-1] != len(tokens[key]):
            raise ValueError(
                f"{os.fspath(path)!r}: {key}_tokens has the shape {tokens[key].shape}, but "
                f"{key}_offsets ends at {o[-1]}"
            )
    counts = {key: len(offsets[key]) - 1 for key in FEATURES}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{os.fspath(path)!r}: different numbers of examples: {counts}")
