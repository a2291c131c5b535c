"""What an adaptation trained, without its base: a safetensors file and a JSON manifest.

A directory with `adapter.safetensors` (adapters, routers, norms, CTC head; see `params.SAVED`) and
`adapter.json` (configs, shapes, and the fingerprint of the frozen leaves that it belongs to).
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import coda_jax
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.checkpoints import files
from coda_jax.checkpoints.shapes import config_class, expected_shapes
from coda_jax.conditional import CodaConfig
from coda_jax.network import T5Config

FORMAT_VERSION = 1
TENSORS = "adapter.safetensors"
MANIFEST = "adapter.json"
MANIFEST_KEYS = {"format_version", "package_version", "base_config", "adapter", "coda", "leaves",
                 "base_fingerprint", "tensors_sha256"}  # fmt: skip

JSON_TYPES = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}


def fingerprint(params: Mapping) -> str:
    """Returns the sha256 of the frozen leaves: their paths, shapes, dtypes and bytes.

    Norms, CTC heads, adapters and routers are left out, so that it does not change by adaptation.
    """
    _, frozen = params_lib.split(params, params_lib.SAVED)
    digest = hashlib.sha256()
    for path, leaf in params_lib.flatten(frozen).items():  # sorted by path
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.shape} {array.dtype.name}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_json(config: Any) -> dict[str, Any] | None:
    """Returns the fields of a flat dataclass, with dtypes by name and tuples as lists."""
    if config is None:
        return None
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "dtype":
            value = jnp.dtype(value).name
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def _from_json(cls: type, values: Any, name: str) -> Any:
    """The inverse of `_to_json`; a field that an older version did not write has its default."""
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{name}={values!r} is not an object.")
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"{name} has unknown keys: { {key: values[key] for key in unknown} }")
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    for field in dataclasses.fields(cls):
        kinds = JSON_TYPES.get(field.type)
        if kinds and field.name in arguments and type(arguments[field.name]) not in kinds:
            raise ValueError(f"{name} has {field.name}={arguments[field.name]!r} of a wrong type.")
    if "dtype" in arguments:
        if arguments["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{name} has dtype={arguments['dtype']!r}, which is no known dtype.")
        arguments["dtype"] = getattr(jnp, arguments["dtype"])
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not valid: {error}") from error


def save_adapter(path: str | os.PathLike, params: Mapping, config: T5Config) -> None:
    """Saves what an adaptation trained: adapters, routers, norms and CTC heads.

    Args:
        path: a directory; created if need be, an older adapter in it is replaced.
        params: the whole parameter tree of the model. Its frozen leaves are only fingerprinted:
            they must be the base's own, in the base's dtype.
        config: the model's config, with `adapter` or `coda` or both.

    Raises:
        ValueError: if the config has neither; if leaves are missing, extra or misshapen.
    """
    if config.adapter is None and config.coda is None:
        raise ValueError("The config has neither an adapter nor coda: there is nothing to save.")
    params_lib.check_tree(expected_shapes(config), params)
    saved, _ = params_lib.split(params, params_lib.SAVED)
    tensors = {name: np.asarray(leaf) for name, leaf in params_lib.flatten(saved).items()}
    base_config = {"family": config.family, **_to_json(config.dense())}
    manifest = {
        "format_version": FORMAT_VERSION,
        "package_version": coda_jax.__version__,
        "base_config": {k: v for k, v in base_config.items() if k not in ("adapter", "coda")},
        "adapter": _to_json(config.adapter),
        "coda": _to_json(config.coda),
        "leaves": {name: _describe(leaf) for name, leaf in tensors.items()},
        "base_fingerprint": fingerprint(params),
    }
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    files.write_tensors(directory / TENSORS, tensors)
    manifest["tensors_sha256"] = _sha256(directory / TENSORS)
    files.write_json(directory / MANIFEST, manifest)


def _describe(leaf: np.ndarray) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": leaf.dtype.name}


def _read_manifest(file: Path) -> dict[str, Any]:
    manifest = files.read_json(file)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version={version!r}; this version reads {FORMAT_VERSION}."
        )
    if manifest.keys() != MANIFEST_KEYS:
        missing = sorted(MANIFEST_KEYS - manifest.keys())
        unknown = sorted(manifest.keys() - MANIFEST_KEYS)
        raise ValueError(f"{file} lacks the keys {missing} and has the unknown keys {unknown}.")
    return manifest


def _read_config(manifest: Mapping[str, Any], file: Path) -> T5Config:
    config = _base_config(manifest["base_config"], f"base_config of {file}")
    adapter = _from_json(AdapterConfig, manifest["adapter"], f"adapter of {file}")
    coda = _from_json(CodaConfig, manifest["coda"], f"coda of {file}")
    if config is None or (adapter is None and coda is None):
        raise ValueError(f"{file} lacks the base config, or both adapter and coda.")
    return dataclasses.replace(config, adapter=adapter, coda=coda)


def _base_config(values: Any, name: str) -> T5Config | None:
    """The dense config of the family that the values name."""
    if not isinstance(values, dict):
        return _from_json(T5Config, values, name)
    fields = dict(values)
    return _from_json(config_class(fields.pop("family", None), name), fields, name)


def _read_saved(directory: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    file = directory / TENSORS
    tensors = files.read_tensors(file)
    found = {name: _describe(leaf) for name, leaf in tensors.items()}
    listed = manifest["leaves"]
    if not isinstance(listed, dict):
        raise ValueError(f"{directory / MANIFEST} has no table of leaves: {listed!r}.")
    if found != listed:
        names = sorted(listed.keys() | found.keys())
        lines = [f"{name}: {found.get(name, 'missing')}, the manifest says "
                 f"{listed.get(name, 'nothing')}"
                 for name in names if found.get(name) != listed.get(name)]  # fmt: skip
        raise ValueError(f"{file} does not match {MANIFEST}:\n  " + "\n  ".join(lines))
    if _sha256(file) != manifest["tensors_sha256"]:
        raise ValueError(
            f"{file} is corrupt, or from another save than {MANIFEST}: sha256 differs."
        )
    return tensors


def load_adapter(path: str | os.PathLike, base_params: Mapping) -> tuple[T5Config, dict]:
    """Puts a saved adapter onto the base that it was trained with.

    Args:
        path: the directory that `save_adapter` wrote.
        base_params: the parameter tree of the base, e.g. from `load_hf`. What an adapter
            file holds is replaced.

    Returns:
        (config, params): the config with `adapter` and `coda` as they were saved, and the whole
        parameter tree.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the base is another one (both fingerprints are named); if a file is corrupt
            or of an unknown format; if leaves are missing, extra or misshapen (all are listed).
    """
    directory = Path(path)
    manifest = _read_manifest(directory / MANIFEST)
    config = _read_config(manifest, directory / MANIFEST)
    saved = _read_saved(directory, manifest)
    expected = expected_shapes(config)
    expected_saved, expected_frozen = params_lib.split(expected, params_lib.SAVED)
    params_lib.check_tree(expected_saved, saved, what=f"The tensors of {directory} do")
    _, frozen = params_lib.split(base_params, params_lib.SAVED)
    params_lib.check_tree(expected_frozen, frozen, what="The base parameters do")
    found = fingerprint(base_params)
    if found != manifest["base_fingerprint"]:
        raise ValueError(
            f"{directory} belongs to the base with fingerprint {manifest['base_fingerprint']}; "
            f"the given base has {found}."
        )
    return config, params_lib.merge(frozen, saved)
