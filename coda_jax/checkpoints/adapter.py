"""What an adaptation trained, without its base: a safetensors file and a JSON manifest.

A directory with `adapter.safetensors` (what the methods created and what of the base they trained)
and `adapter.json`. The manifest of version 2 has

- `format_version`, `package_version`;
- `config`: family, fields and methods, see `config_json`;
- `base`: {path: SHA-256} of the frozen leaves that the adapter belongs to;
- `vocabulary`: the vocabulary's fingerprint, None where it is not known;
- `lengths`: {"inputs", "targets"}, where they are known: how many were kept of an example in
  training, and the longest there was;
- `quantization`: how the base was quantised in training, None for not at all;
- `leaves`: {path: shape, dtype, SHA-256} of the leaves in the safetensors file;
- `manifest_sha256`: of all the rest.

Version 1, which had one fingerprint for all frozen leaves and no names of methods, is read too.
"""

from collections.abc import Mapping
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

import coda_jax
from coda_jax import files, methods, trees
from coda_jax.checkpoints import config_json, tensor_files
from coda_jax.checkpoints.adapter_hub import is_adapter_hub
from coda_jax.checkpoints.fingerprints import add_leaf, fingerprints, leaf_sha256
from coda_jax.checkpoints.peft import CONFIG as LIBRARY_CONFIG
from coda_jax.checkpoints.quantization import quantize
from coda_jax.checkpoints.swap_in import encoder_of
from coda_jax.methods import version_1
from coda_jax.models import ModelConfig, param_shapes
from coda_jax.nn.quantized import KIND, quantization_of

FORMAT_VERSION = 2
TENSORS = "adapter.safetensors"
MANIFEST = "adapter.json"
_KEYS = {
    1: {"format_version", "package_version", "base_config", *version_1.KINDS, "leaves",
        "base_fingerprint", "tensors_sha256"},
    2: {"format_version", "package_version", "config", "base", "vocabulary", "quantization",
        "leaves", "manifest_sha256"},
}  # fmt: skip


_MAY_HAVE = {"lengths"}


def base_fingerprints(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, str]:
    """{path: SHA-256} of the frozen leaves, which do not change by adaptation."""
    return fingerprints(methods.partition(config, params)[1])


def fingerprint_version_1(config: ModelConfig, params: Mapping[str, Any]) -> str:
    """The one SHA-256 of all frozen leaves that version 1 of files and runs has."""
    _, frozen = methods.partition(config, params)
    digest = hashlib.sha256()
    for path, leaf in trees.flatten(frozen).items():  # sorted by path
        add_leaf(digest, leaf, f"{path} ")
    return digest.hexdigest()


def json_sha256(values: Mapping[str, Any], key: str) -> str:
    """The SHA-256 of what JSON holds beside it, under `key`."""
    rest = {name: value for name, value in values.items() if name != key}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _describe(leaf: np.ndarray) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": leaf.dtype.name}


def save_adapter(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    vocabulary: str | None = None,
    lengths: Mapping[str, int] | None = None,
) -> None:
    """Saves what an adaptation trained: the leaves of its methods, norms and heads.

    Args:
        path: a directory; created if need be, an older adapter in it is replaced.
        config: the model's config, with its methods.
        params: the whole parameter tree of the model. Its frozen leaves are only fingerprinted:
            they must be the base's own, in the base's dtype, or quantised of them.
        vocabulary: fingerprint of the vocabulary, where it is known.
        lengths: the most "inputs" that were kept in training, and the longest "targets", where they
            are known.

    Raises:
        ValueError: there is nothing to save: the config has no methods, or leaves none of the base
            frozen; leaves are missing, extra or misshapen.
    """
    if not config.methods:
        raise ValueError("the config has no methods: there is nothing to save")
    trees.check_tree(param_shapes(config), params)
    saved, frozen = methods.partition(config, params)
    if not frozen:
        names = [method.name for method in config.methods]
        raise ValueError(f"{names} train every leaf: what they make is a base, save it as one")
    tensors = {name: np.asarray(leaf) for name, leaf in trees.flatten(saved).items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "package_version": coda_jax.__version__,
        "config": config_json.to_json(config),
        "base": base_fingerprints(config, params),
        "vocabulary": vocabulary,
        "quantization": quantization_of(frozen),
        **({} if lengths is None else {"lengths": dict(lengths)}),
        "leaves": {
            name: {**_describe(leaf), "sha256": leaf_sha256(leaf)} for name, leaf in tensors.items()
        },
    }
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensor_files.write_tensors(directory / TENSORS, tensors, checksum=False)  # see `manifest`
    manifest["manifest_sha256"] = json_sha256(manifest, "manifest_sha256")
    files.write_json(directory / MANIFEST, manifest, sort_keys=True)


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of an adapter's directory, checked as far as it goes without its tensors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of an unknown version.
    """
    file = Path(path) / MANIFEST
    inner = [Path(path) / name for name in ("adapter", "export/adapter")]
    if not file.exists() and (found := [x for x in inner if (x / MANIFEST).exists()]):
        raise FileNotFoundError(f"{file} does not exist: the adapter is {found[0]}")
    if not file.exists() and (Path(path) / LIBRARY_CONFIG).exists():
        raise FileNotFoundError(
            f"{path} is of the library {'adapters' if is_adapter_hub(path) else 'peft'}: coda "
            "convert with LAYOUT=adapter makes an adapter file of it"
        )
    manifest = dict(files.read_json(file))
    version = manifest.get("format_version")
    if type(version) is not int or version not in _KEYS:
        raise ValueError(f"{file} has format_version={version!r}; this version reads {[*_KEYS]}")
    missing = sorted(_KEYS[version] - manifest.keys())
    unknown = sorted(manifest.keys() - _KEYS[version] - _MAY_HAVE)
    if missing or unknown:
        raise ValueError(f"{file} lacks the keys {missing} and has the unknown keys {unknown}")
    if version == 2 and json_sha256(manifest, "manifest_sha256") != manifest["manifest_sha256"]:
        raise ValueError(f"{file} is corrupt, or was changed by hand: its SHA-256 differs")
    leaves = manifest["leaves"]
    if not isinstance(leaves, dict) or not all(isinstance(x, dict) for x in leaves.values()):
        raise ValueError(f"{file} has no table of leaves: {leaves!r}")
    if version == 2 and not isinstance(manifest["base"], dict):
        raise ValueError(f"{file} has no fingerprints of its base: {manifest['base']!r}")
    _check_lengths(manifest.get("lengths", {}), file)
    KIND(f"{file}: quantization", manifest.get("quantization"))
    return manifest


def _check_lengths(lengths: Any, file: Path) -> None:
    good = isinstance(lengths, dict) and lengths.keys() in ({"inputs", "targets"}, set())
    if not good or not all(type(n) is int and n > 0 for n in lengths.values()):
        raise ValueError(f"{file} has senseless lengths: {lengths!r}")


def read_lengths(path: str | os.PathLike | None) -> dict[str, int]:
    """{"inputs", "targets"} of an adapter's training, as `save_adapter` takes them.

    Args:
        path: the directory; None for no adapter.

    Returns:
        The lengths, {} where they are unknown; errors are those of `read_manifest`.
    """
    return {} if path is None else read_manifest(path).get("lengths", {})


def _config(manifest: Mapping[str, Any], file: Path) -> ModelConfig:
    if manifest["format_version"] == 1:
        config = config_json.from_version_1(manifest["base_config"], manifest, file)
    else:
        config = config_json.from_json(manifest["config"], file)
    if not config.methods:
        raise ValueError(f"{file} names no methods")
    return config


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The config of an adapter's model, with its methods; errors are those of `read_manifest`."""
    return _config(read_manifest(path), Path(path) / MANIFEST)


def _tensors(directory: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of an adapter, which must be those of the manifest."""
    file = directory / TENSORS
    tensors = tensor_files.read_tensors(file)
    listed = {
        name: {key: value for key, value in entry.items() if key != "sha256"}
        for name, entry in manifest["leaves"].items()
    }
    found = {name: _describe(leaf) for name, leaf in tensors.items()}
    wrong = [
        f"{name}: {found.get(name, 'missing')}, the manifest says {listed.get(name, 'nothing')}"
        for name in sorted(listed.keys() | found.keys())
        if found.get(name) != listed.get(name)
    ]
    if wrong:
        raise ValueError(f"{file} does not match {MANIFEST}:\n  " + "\n  ".join(wrong))
    if manifest["format_version"] == 1:
        with file.open("rb") as opened:
            corrupt = (
                hashlib.file_digest(opened, "sha256").hexdigest() != manifest["tensors_sha256"]
            )
        names = [TENSORS] if corrupt else []
    else:
        sums = {name: entry.get("sha256") for name, entry in manifest["leaves"].items()}
        names = [name for name, leaf in tensors.items() if leaf_sha256(leaf) != sums[name]]
    if names:
        raise ValueError(
            f"{file} is corrupt, or from another save than {MANIFEST}: SHA-256 differs for {names}"
        )
    return tensors


def _check_base(
    directory: Path,
    manifest: Mapping[str, Any],
    config: ModelConfig,
    frozen: Mapping[str, Any],
    known: Mapping[str, str] | None,
) -> None:
    """Raises ValueError unless the frozen leaves are those that the adapter was trained with."""
    if manifest["format_version"] == 1:
        if kind := quantization_of(frozen):
            raise ValueError(f"{directory} is of version 1: load it before the base is {kind}")
        found = fingerprint_version_1(config, frozen)
        if found != manifest["base_fingerprint"]:
            raise ValueError(
                f"{directory} belongs to the base with fingerprint "
                f"{manifest['base_fingerprint']}; the given base has {found}"
            )
        return
    found = {x: known[x] for x in trees.flatten(frozen)} if known else fingerprints(frozen)
    expected = manifest["base"]
    paths = sorted(found.keys() | expected.keys())
    different = [path for path in paths if found.get(path) != expected.get(path)]
    if different:
        raise ValueError(
            f"{directory} belongs to another base; {len(different)} of {len(paths)} frozen leaves "
            "differ; give the checkpoint that it was trained from:\n  " + "\n  ".join(different)
        )


def _check_config(directory: Path, given: ModelConfig, stored: ModelConfig) -> None:
    """Raises ValueError where the base is of another family or has other sizes and options."""
    if given.family != stored.family:
        raise ValueError(f"{directory} belongs to a {stored.family!r}, not to a {given.family!r}")
    skipped = ("methods", *given.run_fields, *(given.head_fields if given.lacks_head else ()))
    different = stored.differences(given, skipped)
    if different:
        raise ValueError(f"{directory} belongs to another base: {'; '.join(different)}")


def load_adapter(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    known: Mapping[str, str] | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Puts a saved adapter onto the base that it was trained with.

    Args:
        path: the directory that `save_adapter` wrote, of version 1 or 2.
        config: of the base, e.g. from `load_hf`; it says how to compute. Of an encoder-decoder the
            encoder is taken alone where the adapter's model is one.
        params: the base's parameter tree. What an adapter file holds is replaced. Where the
            adapter was trained on quantised weights, the others are quantised, unless they are.
        known: the `fingerprints` of `params`, where they are known already.

    Returns:
        (config, params): the config with the methods as they were saved (and their head, where the
        base has none), and the whole parameter tree.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the base is another one; a file is corrupt or of an unknown format; leaves are
            missing, extra or misshapen (all are listed).
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    stored = _config(manifest, directory / MANIFEST)
    if not stored.num_decoder_layers:
        config, params = encoder_of(config, params)
    _check_config(directory, config, stored)
    saved = _tensors(directory, manifest)
    expected_saved, expected_frozen = methods.partition(stored, param_shapes(stored))
    trees.check_tree(expected_saved, saved, what=f"the tensors of {directory} do")
    _, frozen = methods.partition(stored, params)
    trees.check_tree(expected_frozen, frozen, what="the base parameters do")
    _check_base(directory, manifest, stored, frozen, known)
    if manifest.get("quantization"):
        frozen = quantize(stored, frozen, manifest["quantization"])
    computed = {name: getattr(config, name) for name in config.run_fields}
    return stored.replace(**computed), trees.merge(frozen, saved)
