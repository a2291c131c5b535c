"""Flax's files of weights (`flax_model.msgpack`) as numpy arrays with PyTorch's names and axes.

Such a file is one object of msgpack: maps in maps down to arrays, which are an extension of Flax's
(shape, dtype and bytes), or, above 1 GiB, maps of chunks. Here is a reader of just that: unlike the
library's, it makes an array a view of the mapped file, and stops at whatever else there is.
"""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from coda_jax import trees

MAX_ENTRIES = 50_000  # of all maps together
MAX_DEPTH = 32
MAX_RANK = 8
MAX_TEXT = 200
DTYPES = {x.name: x for x in map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16))}
WEIGHTS = ("kernel", "embedding", "scale")  # PyTorch calls each of them "weight"
ARRAY = 1  # the type of Flax's extension
CHUNKED = "__msgpack_chunked_array__"
# What a first byte says. A length, or a number's value, is in its last bits, or in bytes behind it.
SHORT = (
    *(("number", 0x00, 0x7F), ("map", 0x80, 0x0F), ("list", 0x90, 0x0F), ("text", 0xA0, 0x1F)),
    ("bool", 0xC2, 0x01),
)
LONG = {
    first + place: (kind, size)
    for kind, first, sizes in (
        *(("bytes", 0xC4, (1, 2, 4)), ("extension", 0xC7, (1, 2, 4)), ("text", 0xD9, (1, 2, 4))),
        *(("number", 0xCC, (1, 2, 4, 8)), ("list", 0xDC, (2, 4)), ("map", 0xDE, (2, 4))),
    )
    for place, size in enumerate(sizes)
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Maps the weights of a Flax model into memory.

    Args:
        path: the file. It must stay as it is while the arrays are in use; replacing it by
            renaming another file over it is safe.

    Returns:
        {PyTorch's name: read-only array}; bytes are read from disk when they are first used, but
        for arrays in chunks, which are read here.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything but float32, float16 and bfloat16 arrays by name, or
            is truncated or corrupt.
    """
    try:
        reader = _Reader(np.asarray(np.memmap(path, np.uint8, mode="r")))
        flat = trees.flatten(reader.tree(reader.expect("map")))
        if reader.position < len(reader.data):
            raise ValueError("something follows behind it")
        tensors = {torch_name(name): _torch_axes(name, leaf) for name, leaf in flat.items()}
        if len(tensors) < len(flat):
            raise ValueError("two of its arrays have the same name in PyTorch")
        return tensors
    except ValueError as error:
        raise ValueError(
            f"{path} is not a tree of float32, float16 or bfloat16 arrays as Flax writes it: "
            f"{error}"
        ) from error


def torch_name(path: str) -> str:
    """Returns PyTorch's name of the array at a path such as "encoder/block/0/.../q/kernel"."""
    *modules, name = path.split("/")
    return ".".join((*modules, "weight" if name in WEIGHTS else name))


def _torch_axes(path: str, leaf: Any) -> np.ndarray:
    if not isinstance(leaf, np.ndarray):
        raise ValueError(f"{path:.80} is not an array")
    return leaf.T if path.endswith("/kernel") and leaf.ndim == 2 else leaf


class _Reader:
    """Reads from where it stands; raises ValueError for what is not in files of weights."""

    def __init__(self, data: np.ndarray):
        self.data, self.position, self.entries = data, 0, 0

    def skip(self, size: int) -> int:
        """Returns where it stood."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise ValueError("it ends too early")
        return start

    def take(self, size: int) -> bytes:
        start = self.skip(size)
        return self.data[start : self.position].tobytes()

    def head(self) -> tuple[str, int]:
        """Returns what follows, and its length; for a number or a bool, its value."""
        (byte,) = self.take(1)
        for kind, first, bits in SHORT:
            if byte & ~bits == first:
                return kind, byte & bits
        if byte not in LONG:
            raise ValueError(f"there is a byte {byte:#x} at {self.position - 1:,}")
        kind, size = LONG[byte]
        return kind, int.from_bytes(self.take(size), "big")

    def expect(self, expected: str, most: int = 2**32) -> int:
        """As `head`, of one kind, with the most that its number may be."""
        start = self.position
        kind, number = self.head()
        if kind == expected and number > most:
            raise ValueError(f"the {kind} {number:,} at {start:,} is larger than {most:,}")
        if kind != expected:
            raise ValueError(f"there is a {kind} ({number:,}) for a {expected} at {start:,}")
        return number

    def tree(self, count: int, depth: int = 0) -> Any:
        """Returns a map of `count` entries as dicts and arrays, or as an array, of chunks."""
        if depth > MAX_DEPTH:
            raise ValueError(f"it has maps within maps {depth} deep")
        entries = {}
        for _ in range(count):
            self.entries += 1
            if self.entries > MAX_ENTRIES:
                raise ValueError(f"it has more than {MAX_ENTRIES:,} entries")
            name = self.take(self.expect("text", MAX_TEXT)).decode()
            if name in entries:
                raise ValueError(f"it holds {name!r:.80} twice")
            kind, number = self.head()
            if kind == "map":
                entries[name] = self.tree(number, depth + 1)
            elif kind == "extension":
                entries[name] = self.array(number)
            elif kind in ("number", "bool"):
                entries[name] = number
            else:
                raise ValueError(f"{name!r:.80} is a {kind}")
        return _joined(entries) if CHUNKED in entries else entries

    def array(self, size: int) -> np.ndarray:
        """Returns a view of Flax's extension of `size` bytes: shape, name of the dtype, bytes."""
        kind = self.take(1)[0]
        stop = self.position + size
        if kind != ARRAY or self.expect("list") != 3:
            raise ValueError(f"it has an extension of type {kind}")
        shape = [self.expect("number") for _ in range(self.expect("list", MAX_RANK))]
        name = self.take(self.expect("text", MAX_TEXT)).decode()
        if name not in DTYPES:
            raise ValueError(f"it has an array of {name}")
        start = self.skip(self.expect("bytes"))
        wanted = math.prod(shape) * DTYPES[name].itemsize
        if not self.position - start == wanted > 0 or self.position != stop:
            raise ValueError(f"an array of shape {shape} has {self.position - start:,} bytes")
        return np.ndarray(shape, DTYPES[name], self.data, start)


def _joined(entries: dict[str, Any]) -> np.ndarray:
    """The array of {CHUNKED, "shape": {"0": ...}, "chunks": {"0": ...}}; Flax counts tuples so."""
    try:
        shape, chunks = (
            [entries[key][str(i)] for i in range(len(entries[key]))] for key in ("shape", "chunks")
        )
        joined = np.concatenate(chunks, dtype=chunks[0].dtype, casting="no").reshape(shape)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it has an array in chunks without its parts: {error}") from error
    joined.setflags(write=False)
    return joined
