"""The cache file: the tokenised examples of a task in one npz file. Needs numpy only.

For each of "inputs" and "targets" it holds the examples one after the other and the offsets where
they start; beside them, as JSON, what the examples are. The comment at the end of the archive is
the SHA-256 of all before it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import hashlib
import json
import math
import os
import pathlib
import struct
from typing import Any, BinaryIO
import zipfile
import zlib

import numpy as np

from coda_jax import checks
from coda_jax.data.batches import FEATURES, Example, as_feature
from coda_jax.files import atomic, json_value

CACHE_FORMAT = "coda_jax examples 2"
_WITHOUT_SHA256 = "coda_jax examples 1"
_MARK, _DIGITS = b"sha256:", 64
_ROOM = 2**20  # bytes that are hashed at once
# Of an array that is unpacked: more than MAX_UNPACKED bytes must have been packed to no less than
# one in MAX_PACKING, which tokens and patches never reach and a few kB of zeros do.
MAX_UNPACKED, MAX_PACKING = 2**28, 100
_IDS = ("eos_id", "pad_id", "unk_id")
# What zipfile and numpy raise of a damaged archive.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, TypeError, OSError),
    *(RuntimeError, KeyError, IndexError, OverflowError, SyntaxError),
)


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
    with atomic(path) as temporary:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        _seal(temporary)
    return len(parts["inputs"])


def read_cache(path: str | os.PathLike) -> tuple[CachedExamples, dict]:
    """Reads a file of `write_cache`.

    Args:
        path: the file.

    Returns:
        The examples, with `len` and [i], and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or something else, or a value cannot be right, such as an
            id that the vocabulary does not have; the message says what is wrong.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no cache {os.fspath(path)!r}")
    with open(path, "rb") as file:
        sealed = _is_sealed(file, path)
        with _opened(file, path) as archive:
            metadata, file_format = _metadata(_text(archive, path), path)
            tokens = {key: _array(archive, f"{key}_tokens", "iuf", path) for key in FEATURES}
            offsets = {key: _array(archive, f"{key}_offsets", "iu", path) for key in FEATURES}
    _check_offsets(path, tokens, offsets)
    for key in FEATURES:
        _check_values(tokens[key], f"{os.fspath(path)!r}: {key}_tokens", metadata)
    if file_format == CACHE_FORMAT and not sealed:
        raise ValueError(f"{os.fspath(path)!r} is damaged: its SHA-256 is missing")
    return CachedExamples(tokens, offsets), metadata


# --- The archive ---


def _seal(path: pathlib.Path) -> None:
    """Writes the SHA-256 of a zip file behind it, as its comment."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = _MARK + bytes(_DIGITS)
    with path.open("r+b") as file:
        digest = _sha256(file)
        file.seek(-_DIGITS, os.SEEK_END)
        file.write(digest)


def _is_sealed(file: BinaryIO, path: str | os.PathLike) -> bool:
    """Whether a file ends with its SHA-256; ValueError where it is that of another."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(_MARK) - _DIGITS))
    mark, found = file.read(len(_MARK)), file.read()
    if mark != _MARK or len(found) != _DIGITS:
        return False
    if _sha256(file) != found:
        raise ValueError(f"{os.fspath(path)!r} is damaged: it is not what its SHA-256 says")
    return True


def _sha256(file: BinaryIO) -> bytes:
    """The digest of a file but for the place of the digest, in hexadecimal digits."""
    left = file.seek(0, os.SEEK_END) - _DIGITS
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0:
        part = file.read(min(left, _ROOM))
        digest.update(part)
        left -= len(part)
    return digest.hexdigest().encode()


@contextlib.contextmanager
def _opened(file: BinaryIO, path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """The archive; what is wrong with it in this block is a ValueError that names it."""
    name = repr(os.fspath(path))
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except _DAMAGED as e:
        if isinstance(e, ValueError) and name in str(e):
            raise
        raise ValueError(f"{name} is not a readable npz file: {e or type(e).__name__}") from e


def _array(archive: zipfile.ZipFile, name: str, kinds: str, path: Any) -> np.ndarray:
    """An array of the archive, whose kind is one of some letters of numpy's."""
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"{os.fspath(path)!r} is not a cache of examples: it lacks {[name]}")
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} has version {version} of numpy's format")
        read = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
        shape, fortran, dtype = read(file)
        if dtype.kind not in kinds:
            raise ValueError(f"{os.fspath(path)!r}: {name} holds {dtype}, not what a cache has")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != member.file_size - file.tell():
            raise ValueError(f"{name} of the shape {shape} has another number of bytes")
        if size > max(MAX_UNPACKED, MAX_PACKING * member.compress_size):
            raise ValueError(
                f"{name} has {size:,} bytes, packed to {member.compress_size:,}; beyond "
                f"MAX_UNPACKED={MAX_UNPACKED:,} at most MAX_PACKING={MAX_PACKING} to one are read"
            )
        content = file.read()
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _text(archive: zipfile.ZipFile, path: str | os.PathLike) -> str:
    return str(_array(archive, "metadata", "U", path))


# --- What it holds ---


def _metadata(text: str, path: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """What the examples are, and the file's format."""
    path = repr(os.fspath(path))
    try:
        metadata = json_value(text)
        file_format = metadata.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{path}: metadata without a format ({e})") from e
    if file_format not in (_WITHOUT_SHA256, CACHE_FORMAT):
        raise ValueError(f"{path} has the format {file_format!r}, not {CACHE_FORMAT!r}")
    size = metadata.get("vocab_size")
    checks.Maybe(checks.COUNT)(f"{path}: vocab_size", size)
    for name in _IDS:
        checks.Maybe(checks.Whole(0, size and size - 1))(f"{path}: {name}", metadata.get(name))
    checks.Maybe(checks.text)(f"{path}: vocabulary", metadata.get("vocabulary"))
    lengths = metadata.get("feature_lengths") or {}
    checks.InstanceOf(dict)(f"{path}: feature_lengths", lengths)
    for key, length in lengths.items():
        checks.COUNT(f"{path}: feature_lengths[{key!r}]", length)
    return metadata, file_format


def _check_offsets(path, tokens, offsets) -> None:
    for key in FEATURES:
        o = offsets[key]
        if o.ndim != 1 or not len(o) or o[0] != 0 or (o[1:] < o[:-1]).any():
            raise ValueError(f"{os.fspath(path)!r}: {key}_offsets do not rise from 0")
        if tokens[key].ndim not in (1, 2) or o[-1] != len(tokens[key]):
            raise ValueError(
                f"{os.fspath(path)!r}: {key}_tokens has the shape {tokens[key].shape}, but "
                f"{key}_offsets ends at {o[-1]}"
            )
    counts = {key: len(offsets[key]) - 1 for key in FEATURES}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{os.fspath(path)!r}: different numbers of examples: {counts}")


def _check_values(values: np.ndarray, what: str, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError where an id cannot be one, or a number of a vector is not finite."""
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError(f"{what} holds numbers that are not finite")
        return
    least, most = int(values.min(initial=0)), int(values.max(initial=0))
    size = metadata.get("vocab_size") or 2**31
    if least < 0 or most >= size:
        wrong = least if least < 0 else most
        raise ValueError(f"{what} holds the id {wrong}; the vocabulary has 0 to {size - 1}")
