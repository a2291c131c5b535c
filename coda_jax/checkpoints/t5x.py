"""T5X checkpoints, in both of its formats, without T5X.

A checkpoint is a folder `checkpoint_<step>` of a run's folder. It holds either
- legacy (all public T5 checkpoints): a msgpack file `checkpoint` with the tree of the state, in
  which a large array is replaced by the description of the zarr folder that holds it, named by its
  path with dots (`target.encoder.layers_0.mlp.wo.kernel`); or
- orbax (what T5X writes by default): a folder `state` that orbax's PyTreeCheckpointHandler wrote.
In both the parameters are under `target`. The optimizer's state is never read.
"""

from collections.abc import Mapping
import functools
import os
from pathlib import Path
import re
from typing import Any

from absl import logging
from flax import serialization, traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from coda_jax import trees
from coda_jax.checkpoints.t5x_scanned import BIAS, is_scalable, to_layers
from coda_jax.checkpoints.zarr_arrays import (
    StoredArray,
    array_shapes,
    folder_store,
    list_orbax,
    read_arrays,
)
from coda_jax.models import ModelConfig, param_shapes
from coda_jax.nn.quantized import check_float

PREFIX = "checkpoint"  # of the folders' names
LEGACY_FILE = "checkpoint"
STATE = "state"  # the folder of an orbax checkpoint that holds parameters, step and optimizer
OPTIMIZER = "state/param_states/"  # in the state; never read
TARGETS = ("target", "params")  # where the parameters are in the state
DRIVERS = ("file", "gfile", "gcs")  # where arrays were when they were written; they are here now
VERSIONS = (2, 3)


def is_t5x(directory: Path) -> bool:
    """Returns whether this is a T5X checkpoint, or the folder of a run that has one."""
    return _is_legacy(directory) or _is_orbax(directory) or bool(_steps(directory))


def load_t5x(
    directory: str | os.PathLike, config: ModelConfig, step: int | None = None
) -> dict[str, Any]:
    """Loads the parameters of a T5X checkpoint, legacy or orbax.

    Checkpoints of T5X's scalable T5 are changed to the layout of its T5: stacked layers are
    unstacked, and a relative position bias that all layers have in common is shared.

    Args:
        directory: a checkpoint (`.../checkpoint_1000`, or a copy of it under any name), or a run's
            folder of them (`MODEL_DIR`), of which the newest is taken.
        config: of the model that the checkpoint holds; a dense one for the public checkpoints.
        step: takes the checkpoint of that step from a run's folder.

    Returns:
        Nested dicts of numpy arrays in the dtype of the file.

    Raises:
        FileNotFoundError: if there is no checkpoint, or none of that step.
        ValueError: if a file or chunk is missing, truncated or corrupt; if an array's shape or
            dtype is not what the table of leaves says, or not floating point; if there are arrays
            that are not in the table; if leaves are missing, extra or misshapen. All such leaves
            are listed.
    """
    params, _ = read_t5x(directory, step)
    trees.check_tree(param_shapes(config), params, what=f"the leaves of {directory} do")
    return params


def read_t5x(directory: str | os.PathLike, step: int | None = None) -> tuple[dict, int]:
    """Returns the parameters, whichever model's they are, and the training step (0 for none).

    Arguments and errors are those of `load_t5x`.
    """
    directory = find_t5x(directory, step)
    stored, inline, state = _list(directory)
    flat = {**inline, **read_arrays(stored, directory)}
    _check_floating(flat, directory)
    flat = {path: np.asarray(x, order="C") for path, x in _layer_by_layer(flat, directory).items()}
    return trees.unflatten(flat), _step(state, directory)


def is_remote(path: str) -> bool:
    """Whether a path is one of a bucket, such as gs://..., which T5X reads and we do not."""
    return "://" in path


def t5x_step(directory: str | os.PathLike, step: int | None = None) -> int:
    """Returns the training step alone; arguments and errors are those of `load_t5x`."""
    directory = find_t5x(directory, step)
    return _step(_list(directory)[2], directory)


def _step(state: Mapping[str, Any], directory: Path) -> int:
    step = state.get("state/step", 0)
    if isinstance(step, StoredArray):
        step = read_arrays({"state/step": step}, directory)["state/step"]
    return int(step)


def t5x_shapes(directory: str | os.PathLike, step: int | None = None) -> dict:
    """Returns the tree of `jax.ShapeDtypeStruct` of a T5X checkpoint, whose values are not read.

    Arguments and errors are those of `load_t5x`, save that damage to values is not found.
    """
    directory = find_t5x(directory, step)
    stored, inline, _ = _list(directory)
    flat = {**inline, **array_shapes(stored, directory)}
    _check_floating(flat, directory)
    if is_scalable({path: leaf.shape for path, leaf in flat.items()}):
        # In the place of arrays what takes no memory, but for biases, which may be shared or not.
        biases = {path: array for path, array in stored.items() if path.endswith(BIAS)}
        empty = {path: np.broadcast_to(np.zeros((), x.dtype), x.shape) for path, x in flat.items()}
        flat = _layer_by_layer({**empty, **inline, **read_arrays(biases, directory)}, directory)
    return trees.unflatten(
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    )


def is_of_scalable_t5(directory: str | os.PathLike) -> bool:
    """Whether a checkpoint is one of T5X's scalable T5; arguments and errors as of `load_t5x`."""
    directory = find_t5x(directory)
    stored, inline, _ = _list(directory)
    leaves = {**inline, **array_shapes(stored, directory)}
    return is_scalable({path: leaf.shape for path, leaf in leaves.items()})


def _layer_by_layer(flat: dict[str, np.ndarray], directory: Path) -> dict[str, np.ndarray]:
    """The leaves under the names of T5X's T5."""
    if not is_scalable({path: leaf.shape for path, leaf in flat.items()}):
        return flat
    _say_taken_apart(directory)
    return to_layers(flat, directory)


@functools.cache  # once, however often a checkpoint is looked at
def _say_taken_apart(directory: Path) -> None:
    logging.warning("%s is of T5X's scalable T5: its layers are taken apart", directory)


def _list(directory: Path) -> tuple[dict[str, StoredArray], dict[str, Any], dict[str, Any]]:
    """Returns {path: leaf} of the stored parameters, of those in the table, of the whole state."""
    if _is_legacy(directory):
        item, state = directory, _list_legacy(directory)
    else:
        item, state = directory / STATE, list_orbax(directory / STATE)
    prefix, leaves = _target(state, directory)
    stored = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, StoredArray)}
    _check_folders(item, prefix, stored)
    return stored, {path: leaf for path, leaf in leaves.items() if path not in stored}, state


def find_t5x(directory: str | os.PathLike, step: int | None = None) -> Path:
    """Returns the folder of a checkpoint; see `load_t5x` for arguments and errors."""
    if is_remote(str(directory)):
        raise ValueError(
            f"{directory} is not a local folder; copy the checkpoint first, for example with "
            "gcloud storage cp --recursive."
        )
    directory = Path(directory)
    if _is_legacy(directory) or _is_orbax(directory):
        if step is not None and directory.name != f"{PREFIX}_{step}":
            raise ValueError(f"{directory} is one checkpoint, and not named {PREFIX}_{step}.")
        return directory
    steps = _steps(directory)
    if not steps or step not in (None, *steps):
        lacks = f"has no {PREFIX}_{'<step>' if step is None else step}"
        raise FileNotFoundError(
            f"{directory} {lacks if directory.exists() else 'does not exist'}, and is not a T5X "
            f"checkpoint (a file '{LEGACY_FILE}' or a folder '{STATE}'). Steps found: {steps}"
        )
    return find_t5x(directory / f"{PREFIX}_{max(steps) if step is None else step}")


def _is_legacy(directory: Path) -> bool:
    return (directory / LEGACY_FILE).is_file()


def _is_orbax(directory: Path) -> bool:
    return (directory / STATE).is_dir()


def _steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder; one that is being written has a longer name."""
    names = (path.name for path in directory.iterdir()) if directory.is_dir() else ()
    matches = (re.fullmatch(rf"{PREFIX}_(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def _list_legacy(directory: Path) -> dict[str, Any]:
    """Returns {path: value, or where it is stored} of parameters and step in a msgpack file."""
    file = directory / LEGACY_FILE
    content = file.read_bytes()
    if content.startswith(b"model_checkpoint_path"):
        raise ValueError(
            f"{file} is of a TensorFlow checkpoint of Mesh TensorFlow's T5; convert it with "
            "T5X's t5x.scripts.convert_tf_checkpoint."
        )
    try:
        tree = serialization.msgpack_restore(content)
    except Exception as error:  # msgpack, flax and numpy each raise their own
        raise ValueError(f"{file} is not a complete msgpack file: {error}") from error
    if isinstance(tree, dict) and "optimizer" in tree:
        if tree.get("version") not in VERSIONS:
            raise ValueError(f"{file} has version={tree.get('version')!r}, not one of {VERSIONS}.")
        tree = tree["optimizer"]
    if not isinstance(tree, dict):
        raise ValueError(f"{file} must hold a tree of arrays, not a {type(tree).__name__}.")
    flat = traverse_util.flatten_dict(tree, is_leaf=_is_spec, sep="/")
    return {
        path: _parse_spec(leaf, path, directory) if isinstance(leaf, dict) else leaf
        for path, leaf in flat.items()
        if not path.startswith(OPTIMIZER)
    }


def _is_spec(_, node: Mapping) -> bool:
    return node.keys() >= {"driver", "kvstore", "metadata"}


def table_of(target: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The table of leaves of parameters that T5X is about to restore, which may lie anywhere.

    Args:
        target: nested dicts of arrays, of what tensorstore says of them or, where orbax wrote them,
            of their types alone.

    Returns:
        {path: shape}, None for a shape that is not said.
    """
    flat = traverse_util.flatten_dict(target, is_leaf=_is_spec, sep="/")
    said = {path: x["metadata"]["shape"] if isinstance(x, Mapping) else getattr(x, "shape", None)
            for path, x in flat.items()}  # fmt: skip
    return {path: None if shape is None else tuple(shape) for path, shape in said.items()}


def with_leaves(target: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What T5X is about to restore, with further leaves of these paths."""
    flat = traverse_util.flatten_dict(target, is_leaf=_is_spec, sep="/")
    return traverse_util.unflatten_dict({**flat, **leaves}, sep="/")


def _parse_spec(spec: Mapping[str, Any], path: str, directory: Path) -> StoredArray:
    """Returns the array that tensorstore's description in the msgpack file speaks of."""
    try:
        kvstore, metadata = dict(spec["kvstore"]), dict(spec["metadata"])
        # Before version 0.1.14 of tensorstore the path was outside of the kvstore.
        name = kvstore.get("path", spec.get("path")).rstrip("/")
        shape, dtype = metadata.get("shape"), spec.get("dtype")
        if dtype is None and "dtype" in metadata:
            dtype = np.dtype(metadata["dtype"]).name
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{directory}: {path} is described by {spec}: {error}") from error
    inside = re.fullmatch(r"[\w.-]+", name) and name not in (".", "..")
    if spec["driver"] != "zarr" or kvstore.get("driver") not in DRIVERS or not inside:
        raise ValueError(f"{directory}: {path} is stored in a way that is not handled: {spec}")
    return StoredArray(
        folder_store(directory / name), shape=None if shape is None else tuple(shape), dtype=dtype
    )


def _target(state: Mapping[str, Any], source: Path) -> tuple[str, dict[str, Any]]:
    """Returns (the prefix of the parameters' names in files, {path: leaf} of the parameters)."""
    names = {path.split("/")[0] for path in state}
    roots = [name for name in TARGETS if name in names]
    if len(roots) != 1 or "flax_mutables" in names:
        raise ValueError(
            f"{source} holds {sorted(names)}; it must hold the parameters under one of {TARGETS}, "
            "and no flax_mutables, which are variables that a T5 does not have."
        )
    prefix = roots[0] + "/"
    if all(path.startswith(f"{prefix}params/") for path in state if path.startswith(prefix)):
        prefix += "params/"
    leaves = {p.removeprefix(prefix): leaf for p, leaf in state.items() if p.startswith(prefix)}
    return prefix.replace("/", "."), leaves


def _check_folders(item: Path, prefix: str, stored: Mapping[str, StoredArray]) -> None:
    """Raises ValueError where there are folders of parameters that no leaf speaks of."""
    known = {Path(array.kvstore["path"]).name for array in stored.values()}
    extra = sorted(folder.name for folder in item.glob(f"{prefix}*") if folder.name not in known)
    if extra:
        raise ValueError(
            f"{item} has parameters that are not in its table of leaves:\n  " + "\n  ".join(extra)
        )


def _check_floating(leaves: Mapping[str, Any], source: Path) -> None:
    """Raises ValueError where a parameter is not an array of floats."""
    wrong = [f"{path}: {getattr(leaf, 'dtype', leaf)}" for path, leaf in leaves.items()
             if not jnp.issubdtype(getattr(leaf, "dtype", int), jnp.floating)]  # fmt: skip
    if wrong:
        raise ValueError(f"{source} has parameters that are not floats:\n  " + "\n  ".join(wrong))


def save_t5x(directory: str | os.PathLike, params: Mapping, step: int = 0) -> Path:
    """Saves parameters as an orbax checkpoint that T5X restores.

    Adapters and routers are under `target` with the names that they have here, which are those of
    a T5X model with our network. There is no optimizer state: T5X starts it anew, which its
    training has to be told (`state/param_states.*` mapped to None); its inference needs none.

    Args:
        directory: the run's folder; the checkpoint is its `checkpoint_<step>`.
        params: the parameter tree; dtypes are kept; none may be quantised.
        step: the training step.

    Returns:
        The checkpoint's folder.

    Raises:
        FileExistsError: if there is a checkpoint of that step.
    """
    check_float(params, "a T5X checkpoint")
    directory = Path(directory).absolute()
    path = directory / f"{PREFIX}_{step}"
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or choose another directory.")
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    state = {"target": trees.unflatten(flat), "state": {"step": np.asarray(step, np.int32)}}
    import orbax.checkpoint as ocp  # Here: it takes as long to import as flax, and reads nothing.

    handler = ocp.CompositeCheckpointHandler(**{STATE: ocp.PyTreeCheckpointHandler()})
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(state)}))
    return path
