"""Arrays in the zarr stores of T5X and orbax, read so that nothing missing is taken for zeros.

By default a chunk that is missing from a zarr store reads as zeros. Both T5X and orbax write every
chunk, also those of zeros, so here it is an error.
"""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from coda_jax import files

METADATA = "_METADATA"  # orbax's table of the leaves of a tree
MANIFEST = "manifest.ocdbt"  # of a store that holds all arrays of a folder


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """Where an array is stored, and what is said of it elsewhere.

    Attributes:
        kvstore: tensorstore's description of the place.
        driver: tensorstore's name of the format, "zarr" or "zarr3".
        shape: what the checkpoint's table of leaves says, None where it says nothing.
        dtype: name, likewise.
    """

    kvstore: Mapping[str, Any]
    driver: str = "zarr"
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    def spec(self) -> dict[str, Any]:
        """Returns tensorstore's description of the array."""
        return {"driver": self.driver, "kvstore": self.kvstore, "fill_missing_data_reads": False}

    def difference(self, store: tensorstore.TensorStore) -> str | None:
        """Returns how the opened array differs from the table of leaves, None if it does not."""
        if self.shape is not None and store.shape != self.shape:
            return f"has shape {store.shape}, the table of leaves says {self.shape}"
        if self.dtype is not None and store.dtype.name != self.dtype:
            return f"is {store.dtype.name}, the table of leaves says {self.dtype}"
        return None


def folder_store(folder: Path) -> dict[str, Any]:
    """Returns the store of an array that has a folder of its own."""
    return {"driver": "file", "path": f"{folder.absolute()}/"}


def list_orbax(item: Path) -> dict[str, StoredArray]:
    """Lists the leaves of a tree that orbax wrote, without opening any.

    Args:
        item: the folder with the tree's `_METADATA`.

    Returns:
        {path: where it is}, with dict keys, attribute names and indices joined by "/".

    Raises:
        FileNotFoundError: if there is no table of leaves.
        ValueError: if it is not one of orbax.
    """
    table = files.read_json(item / METADATA)
    try:
        entries = [entry["key_metadata"] for entry in table["tree_metadata"].values()]
        paths = [[str(key["key"]) for key in entry] for entry in entries]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{item / METADATA} is not a table of leaves of orbax.") from error
    outside = [keys for keys in paths if any("/" in key for key in keys)]
    if outside:
        raise ValueError(f"{item / METADATA} names leaves outside of its folder: {outside}")
    driver = "zarr3" if table.get("use_zarr3") else "zarr"
    in_one_store = table.get("use_ocdbt", (item / MANIFEST).is_file())
    leaves = {}
    for keys in paths:
        name = ".".join(keys)
        if in_one_store:
            store = {"driver": "ocdbt", "base": folder_store(item), "path": f"{name}/"}
        else:
            store = folder_store(item / name)
        leaves["/".join(keys)] = StoredArray(store, driver)
    return leaves


def array_shapes(
    arrays: Mapping[str, StoredArray], source: Path
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of arrays, whose values are not read.

    Args and errors are those of `read_arrays`, save that only an array's description is looked at.
    """
    problems: dict[str, str] = {}
    opened = _open(arrays, problems)
    _raise_problems(problems, arrays, source)
    return {
        path: jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype)
        for path, store in opened.items()
    }


def read_arrays(arrays: Mapping[str, StoredArray], source: Path) -> dict[str, np.ndarray]:
    """Reads arrays, all at once.

    Args:
        arrays: {path: where it is}.
        source: the checkpoint, for errors.

    Returns:
        {path: array}, in the order of `arrays`.

    Raises:
        ValueError: lists every array that is missing, incomplete or corrupt, or that differs from
            the table of leaves.
    """
    problems: dict[str, str] = {}
    sound = {path: store.read() for path, store in _open(arrays, problems).items()}
    values = _settle(sound, problems)
    _raise_problems(problems, arrays, source)
    return values


def _open(
    arrays: Mapping[str, StoredArray], problems: dict[str, str]
) -> dict[str, tensorstore.TensorStore]:
    """Opens arrays; those that cannot be used are added to `problems` instead."""
    # One context, so that the index of an orbax store is read once and not for every array.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 10**8}})
    opened = _settle(
        {
            path: tensorstore.open(array.spec(), open=True, read=True, context=context)
            for path, array in arrays.items()
        },
        problems,
    )
    differences = {path: arrays[path].difference(store) for path, store in opened.items()}
    problems |= {path: text for path, text in differences.items() if text is not None}
    return {path: store for path, store in opened.items() if path not in problems}


def _raise_problems(problems: Mapping[str, str], arrays: Mapping, source: Path) -> None:
    if problems:
        lines = "\n  ".join(f"{path} {problems[path]}" for path in arrays if path in problems)
        raise ValueError(f"{source} is damaged ({len(problems)} leaves):\n  {lines}")


def _settle(futures: Mapping[str, Any], problems: dict[str, str]) -> dict[str, Any]:
    """Returns the results of futures; what went wrong is added to `problems`."""
    results = {}
    for path, future in futures.items():
        try:
            results[path] = future.result()
        except ValueError as error:  # what tensorstore raises for data that is missing or corrupt
            problems[path] = "cannot be read: " + str(error).split(" [tensorstore_spec=")[0]
    return results
