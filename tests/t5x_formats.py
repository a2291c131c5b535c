"""Writes T5X's two checkpoint formats, as its documentation and its files describe them."""

from flax import serialization
from helpers import config, random_params
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from coda_jax import trees

CODA = config({"reduction": 3})


def fresh_params():
    """Returns parameters of which some leaves are all zeros, as those of a new adapter."""
    return jax.tree.map(np.asarray, random_params(CODA, fresh=True))


def write_zarr(folder, array, chunks):
    spec = {"driver": "zarr", "dtype": array.dtype.name,
            "kvstore": {"driver": "file", "path": str(folder)},
            "metadata": {"compressor": {"id": "gzip"}, "shape": array.shape,
                         "chunks": chunks}}  # fmt: skip
    tensorstore.open(spec, create=True).result().write(array).result()


def write_legacy(directory, params, inline=(), edit_spec=None, edit_tree=None):
    """Writes a legacy checkpoint, with the leaves `inline` in the msgpack file itself."""
    flat = {}
    for path, leaf in trees.flatten(params).items():
        name = f"target/{path}".replace("/", ".")
        leaf = np.asarray(leaf)
        if path in inline:
            flat[f"target/{path}"] = leaf
            continue
        chunks = [max(1, size // 2) for size in leaf.shape]
        write_zarr(directory / name, leaf, chunks)
        metadata = {"chunks": chunks, "compressor": {"id": "gzip"}, "shape": list(leaf.shape)}
        kvstore = {"driver": "file", "path": f"{name}/"}
        spec = {"driver": "zarr", "dtype": leaf.dtype.name, "kvstore": kvstore}
        spec["metadata"] = metadata
        flat[f"target/{path}"] = edit_spec(spec) if edit_spec else spec
    flat["state/step"] = np.int32(7)
    # The optimizer's state, which is not read: there is no such array.
    flat["state/param_states/x/v"] = {"driver": "n5", "kvstore": {"path": "x"}, "metadata": {}}
    tree = trees.unflatten(flat | {"state/param_states/x/v_row": np.zeros(1, np.float32)})
    tree = {"version": 3, "optimizer": tree}
    if edit_tree:
        edit_tree(tree)
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def write_orbax(directory, params, use_ocdbt):
    state = {"target": params, "state": {"step": np.int32(7), "param_states": {"x": np.ones(3)}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as checkpointer:
        checkpointer.save(directory / "state", args=ocp.args.PyTreeSave(state))


def write(kind, directory, params):
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "legacy":
        write_legacy(directory, params)
    else:
        write_orbax(directory, params, use_ocdbt=kind == "orbax")


def array_folder(kind, directory, path):
    """The folder of an array, where arrays have one."""
    name = f"target/{path}".replace("/", ".")
    return directory / name if kind == "legacy" else directory / "state" / name


KINDS = ("legacy", "orbax", "orbax_zarr")
FOLDERS = ("legacy", "orbax_zarr")  # in which every array has a folder of its own
