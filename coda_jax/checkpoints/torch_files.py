"""PyTorch's files of weights (`pytorch_model.bin`) as numpy arrays, without PyTorch.

Such a file is a pickle, which says how tensors lie in storages, and the bytes of the storages: in a
zip file, or, before PyTorch 1.6, one behind the other. Tensors become views of the mapped file.
"""

from collections.abc import Mapping
import io
import math
from pathlib import Path
import struct
import zipfile
import zlib

import numpy as np

from coda_jax.checkpoints.torch_pickles import Tensor, interpret

MAX_PICKLE = 2**20  # bytes
MAX_RANK = 8
LOCAL_HEADER = b"PK\x03\x04"  # what each entry of a zip file starts with
ENCRYPTED = 1
LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # the magic number and the version of the older format

Contents = tuple[Mapping[str, Tensor], Mapping[str, np.ndarray]]  # storages by key, as bytes


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Maps a state dict that `torch.save` wrote into memory. No code in it is run.

    Args:
        path: the file. It must stay as it is while the arrays are in use; replacing it by
            renaming another file over it is safe.

    Returns:
        {name: read-only array}; those of the older format are read from disk when they are first
        used, those in a zip file now too, as that has a checksum of each storage.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything but floating point tensors by name, or is
            truncated or corrupt.
    """
    try:
        data = np.asarray(np.memmap(path, np.uint8, mode="r"))
        is_zip = data[:4].tobytes() == LOCAL_HEADER
        tensors, storages = _read_zip(path, data) if is_zip else _read_legacy(data)
        return {name: _view(name, tensor, storages) for name, tensor in tensors.items()}
    except (ValueError, LookupError, TypeError, struct.error, zipfile.BadZipFile,
            NotImplementedError) as error:  # fmt: skip
        raise ValueError(
            f"{path} is not a state dict of floating point tensors as torch.save writes it: {error}"
        ) from error


class _ShortReads(io.FileIO):
    """A file of which nobody gets more than MAX_PICKLE bytes, whatever a zip's directory says."""

    def read(self, size=-1):
        return super().read(MAX_PICKLE if size < 0 else min(size, MAX_PICKLE))


def _read_zip(path: Path, data: np.ndarray) -> Contents:
    with _ShortReads(path) as file:
        listed = zipfile.ZipFile(file).infolist()
    entries = {entry.filename: entry for entry in listed}
    if len(entries) < len(listed):
        raise ValueError("two of its entries have the same name")
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} entries data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    pickle = _stored(entries[pickles[0]], data)[: MAX_PICKLE + 1].tobytes()
    if len(pickle) > MAX_PICKLE:
        raise ValueError(f"its pickle has more than {MAX_PICKLE} bytes")
    if zlib.crc32(pickle) != entries[pickles[0]].CRC:
        raise ValueError("its pickle is damaged")
    order = entries.get(folder + "byteorder")  # since PyTorch 2.1
    if order and _stored(order, data)[:7].tobytes() != b"little":
        raise ValueError("its bytes are not in little-endian order")
    prefix = folder + "data/"
    storages = {
        name.removeprefix(prefix): _stored(entry, data)
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    for key, storage in storages.items():
        if zlib.crc32(storage) != entries[prefix + key].CRC:
            raise ValueError(f"its storage {key!r:.80} is damaged: the CRC-32 differs")
    return _state_dict(io.BytesIO(pickle)), storages


def _stored(entry: zipfile.ZipInfo, data: np.ndarray) -> np.ndarray:
    """The bytes of an entry, which must be stored as they are: a bomb is small until it is read."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
        raise ValueError(f"its entry {entry.filename!r:.80} is compressed or encrypted")
    header = entry.header_offset
    magic, *lengths = struct.unpack("<4s22xHH", data[header : header + 30])
    start = header + 30 + sum(lengths)
    stop = start + entry.file_size
    # The next entry, or the directory, comes right behind it.
    if magic != LOCAL_HEADER or data[stop : stop + 2].tobytes() != LOCAL_HEADER[:2]:
        raise ValueError(f"its entry {entry.filename!r:.80} is not where its directory says")
    return data[start:stop]


def _read_legacy(data: np.ndarray) -> Contents:
    """Five pickles, then for each storage the number of its elements and its bytes."""
    stream = io.BytesIO(data[:MAX_PICKLE].tobytes())
    if (interpret(stream), interpret(stream)) != LEGACY:
        raise ValueError("it does not start as one")
    if interpret(stream)["little_endian"] is not True:
        raise ValueError("its bytes are not in little-endian order")
    tensors, keys = _state_dict(stream), interpret(stream)
    expected = {x.storage.key: x.storage for x in tensors.values()}
    stop, storages = stream.tell(), {}
    if type(keys) is not list or any(type(key) is not str or key not in expected for key in keys):
        # A key that is a tuple of tuples could take forever to hash, or overflow the stack.
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        (numel,) = struct.unpack("<q", data[stop : stop + 8])
        if numel != expected[key].numel:
            raise ValueError(f"storage {key!r:.80} has {numel} elements, not {expected[key].numel}")
        start, stop = stop + 8, stop + 8 + numel * expected[key].dtype.itemsize
        storages[key] = data[start:stop]
    return tensors, storages


def _state_dict(stream: io.BytesIO) -> dict[str, Tensor]:
    tensors = interpret(stream)
    if type(tensors) is not dict:
        raise ValueError(f"it holds a {type(tensors).__name__}, not a dict")
    others = [name for name, value in tensors.items() if type(value) is not Tensor]
    if others:
        raise ValueError(f"{others[0]!r:.80} is not a tensor")
    return tensors


def _view(name: str, tensor: Tensor, storages: Mapping[str, np.ndarray]) -> np.ndarray:
    storage, offset, size, stride = tensor.storage, tensor.offset, tensor.size, tensor.stride
    found, itemsize = storages.get(storage.key, ()), storage.dtype.itemsize
    if len(found) != storage.numel * itemsize:
        raise ValueError(
            f"the storage of {name!r:.80} has {len(found)} bytes, not {storage.numel} x {itemsize}"
        )
    if not len(size) == len(stride) <= MAX_RANK or any(type(n) is not int for n in size + stride):
        raise ValueError(f"{name!r:.80} has {len(size)} sizes and {len(stride)} strides")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # With more elements than its storage has, it would repeat some; a small file could fill memory.
    most = max(last + 1, math.prod(size))
    if most > storage.numel or min((offset, *stride)) < 0 or min(size, default=1) < 1:
        place = f"offset {offset}, size {size}, strides {stride}"
        raise ValueError(f"{name!r:.80} is not within its {storage.numel} elements: {place:.200}")
    strides = [step * itemsize for step in stride]
    return np.ndarray(size, storage.dtype, found, offset * itemsize, strides)
