"""The weights of a checkpoint's folder, in whichever format they are."""

from collections.abc import Callable
import dataclasses
import logging
from pathlib import Path

import numpy as np

from coda_jax import hub
from coda_jax.checkpoints import msgpack_files, tensor_files, torch_files
from coda_jax.files import check_is_no_pointer, read_json

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Format:
    """How weights are stored, in one file or in shards.

    Attributes:
        file: the one file.
        read: (file) -> {PyTorch's name: read-only array}.
        torch_name: (name in the index of shards) -> PyTorch's.
    """

    file: str
    read: Callable[[Path], dict[str, np.ndarray]]
    torch_name: Callable[[str], str] = str

    @property
    def index(self) -> str:
        """The file that says which tensor is in which shard."""
        return hub.index_of(self.file)


FORMATS = (  # where a folder has several, the first of them is read
    Format(hub.SAFETENSORS, tensor_files.read_tensors),
    Format(hub.FLAX, msgpack_files.read_tensors, msgpack_files.torch_name),
    Format(hub.TORCH, torch_files.read_tensors),
)
UNREAD = ("tf_model.h5", "rust_model.ot")  # of TensorFlow and of rust-bert


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Maps the weights of a folder, or all their shards, into memory.

    Returns:
        {PyTorch's name: read-only array}.

    Raises:
        FileNotFoundError: if there are none, or a shard is missing.
        ValueError: if a file is not what its name says, or damaged; if the index and the shards
            disagree.
    """
    names = {name: form for form in FORMATS for name in (form.file, form.index)}
    found = [name for name in names if (directory / name).is_file()]
    if not found:
        unread = [name for name in UNREAD if (directory / name).is_file()]
        hint = f"; {' and '.join(unread)} cannot be read" if unread else ""
        for form in FORMATS:  # such as model.fp16.safetensors
            stem, suffix = form.file.split(".")
            for path in sorted(directory.glob(f"{stem}.*.{suffix}")):
                hint += f"; to read {path.name}, rename it to {form.file}"
        raise FileNotFoundError(f"{directory} has none of {', '.join(names)}{hint}")
    first, *others = found
    if others:
        _logger.warning("%s: reading %s, not %s", directory, first, ", ".join(others))
    else:
        _logger.info("%s: reading %s", directory, first)
    form = names[first]
    return _read(directory / first, form) if first == form.file else _read_shards(directory, form)


def _read(path: Path, form: Format) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        check_is_no_pointer(file.read(100), path)
    return form.read(path)


def _read_shards(directory: Path, form: Format) -> dict[str, np.ndarray]:
    index = directory / form.index
    weight_map = read_json(index, hub.MAX_JSON_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map.")
    unsafe = sorted({str(f) for f in weight_map.values() if Path(str(f)).name != f})
    if unsafe:
        raise ValueError(f"{index} names files outside of its directory: {unsafe}")
    weight_map = {form.torch_name(name): file for name, file in weight_map.items()}
    shards = {file: directory / file for file in sorted(set(weight_map.values()))}
    absent = [file for file, path in shards.items() if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{directory} lacks shards that {form.index} names: {absent}")
    tensors, problems = {}, []
    for file, path in shards.items():
        for name, leaf in _read(path, form).items():
            tensors.setdefault(name, leaf)
            if weight_map.get(name) != file:
                problems.append(f"{name} is in {file}, the index says {weight_map.get(name)}")
    absent = weight_map.keys() - tensors.keys()
    problems += [f"{name} is not in {weight_map[name]}" for name in sorted(absent)]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{index} does not match its shards:\n  {lines}")
    return tensors
