"""Safetensors files as numpy arrays, read lazily and written atomically.

Checkpoints that are written here have a SHA-256 of the tensors among the file's metadata, which
other libraries ignore; where a file has it, the tensors are checked when it is read. It is also of
other metadata, where a file has some.
"""

from collections.abc import Mapping
import hashlib
import json
from pathlib import Path
import re

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from coda_jax.files import atomic, write_json
from coda_jax.hub import SAFETENSORS, index_of

SINGLE, INDEX = SAFETENSORS, index_of(SAFETENSORS)
_SHA256 = "coda_jax_sha256"  # in the metadata of a file
# transformers reads only files that say that they hold PyTorch's layout.
_FORMAT = {"format": "pt"}
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Maps a safetensors file into memory.

    Args:
        path: the file. It must stay as it is while the arrays are in use; replacing it by
            renaming another file over it is safe.

    Returns:
        {name: read-only array}; bytes are read from disk when they are first used, or now where
        the file has a checksum.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or corrupt, a tensor is not floating point, or the
            tensors are not those of the checksum.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="np"):  # checks the header against the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    metadata = header.pop("__metadata__", {})
    unknown = [f"{name} ({entry['dtype']})" for name, entry in header.items()
               if entry["dtype"] not in DTYPES]  # fmt: skip
    if unknown:
        raise ValueError(f"{path} holds tensors that are not floating point: {unknown}")
    data = np.memmap(path, np.uint8, mode="r", offset=8 + header_size) if header else None
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        flat = np.asarray(data[start:stop]).view(DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    if _SHA256 in metadata and metadata[_SHA256] != _sha256(tensors, _others(metadata)):
        raise ValueError(f"{path} is damaged: its tensors are not what its SHA-256 says")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """{name: text} of the metadata that a file, which `read_tensors` reads, has beside its own."""
    with safe_open(path, framework="np") as file:
        return _others(file.metadata() or {})


def _others(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in metadata.items() if name not in (_SHA256, *_FORMAT)}


def _sha256(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """The digest of metadata, and of contiguous tensors: their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, text in sorted(metadata.items()):
        digest.update(f"{name} {text}\n".encode())
    for name, leaf in sorted(tensors.items()):
        digest.update(f"{name} {leaf.shape} {leaf.dtype.name}\n".encode())
        digest.update(leaf.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_tensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    checksum: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file under a temporary name, then renames it to `path`.

    Args:
        path: the file; its folder must exist.
        tensors: {name: array in any layout}; dtypes are kept.
        checksum: whether the file has one; another file may have those of the tensors.
        metadata: {name: text} of more; see `read_metadata`.

    Raises:
        ValueError: if a dtype is not one of DTYPES.
    """
    wrong = [f"{name} ({leaf.dtype})" for name, leaf in tensors.items()
             if np.dtype(leaf.dtype) not in DTYPES.values()]  # fmt: skip
    if wrong:
        raise ValueError(f"Tensors that are not floating point cannot be saved: {wrong}")
    contiguous = {name: np.ascontiguousarray(leaf) for name, leaf in tensors.items()}
    more = dict(metadata or {})
    digest = {_SHA256: _sha256(contiguous, more)} if checksum else {}
    with atomic(path) as temporary:
        save_file(contiguous, temporary, metadata=_FORMAT | more | digest)
        if temporary.is_file():  # no pipe
            _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Puts the metadata of a new file in order: the library's is another in each call."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(size))


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Returns the tensors' names in groups of at most `limit` bytes (or of one tensor)."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def write_directory(directory: Path, tensors: Mapping[str, np.ndarray], limit: int) -> None:
    """Writes model.safetensors, or shards with an index where the tensors exceed `limit` bytes.

    Files of an older checkpoint of the other kind are removed, so that none can be read instead.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {name: leaf.nbytes for name, leaf in tensors.items()}
    groups = plan_shards(sizes, limit)
    if len(groups) == 1:
        write_tensors(directory / SINGLE, tensors)
        written = {SINGLE}
    else:
        weight_map = {}
        for number, names in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            write_tensors(directory / file, {name: tensors[name] for name in names})
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / INDEX, index, sort_keys=True)
        written = {INDEX, *weight_map.values()}
    for path in directory.iterdir():
        ours = path.name in (SINGLE, INDEX) or SHARD_NAME.fullmatch(path.name)
        if ours and path.name not in written:
            path.unlink()
