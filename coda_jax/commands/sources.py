"""What `convert` and `prune` read: every kind of checkpoint, with its base where there is one.

What is read is known by what its folder holds:
- `config.json`: a dense Hugging Face checkpoint, with the adapter file in its folder `adapter`, if
  there is one: so `convert` writes them;
- `adapter.json`: an adapter file, together with its base;
- `adapter_config.json`: an adapter of the libraries peft or adapters, together with its base;
- `run.json`: a run of `coda train`, together with its base where only adapters were trained;
- a T5X checkpoint, or a run's folder of them. The config is not part of it: the run's folder says
  it, or else sizes are read off the shapes, and what adapters and routers do has to be said.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from coda_jax import checkpoints, files, hub, trees
from coda_jax import methods as methods_lib
from coda_jax.checkpoints.adapter import (
    MANIFEST,
    base_fingerprints,
    fingerprint_version_1,
    read_manifest,
)
from coda_jax.checkpoints.config_json import from_json, from_version_1
from coda_jax.checkpoints.generation_config import GENERATION_CONFIG_FILE
from coda_jax.checkpoints.huggingface import CONFIG_FILE
from coda_jax.checkpoints.peft import CONFIG as LIBRARY_CONFIG
from coda_jax.checkpoints.t5x import is_t5x, read_t5x
from coda_jax.checkpoints.t5x_partial import frozen_leaves, is_partial, lacks_base, onto_base
from coda_jax.checkpoints.zarr_arrays import list_orbax, read_arrays
from coda_jax.commands.t5x_identity import config_of, infer_config
from coda_jax.data.vocabularies import find_files, find_fingerprint
from coda_jax.methods import Method
from coda_jax.models import ModelConfig, param_shapes, preprocessing
from coda_jax.objectives import OBJECTIVES
from coda_jax.training.run_checkpoints import STATE, DamagedError, check_leaves, read_contents
from coda_jax.training.run_directory import CHECKPOINTS, FORMAT_VERSION, RUN_FILE, saved_steps

_MACROS = {  # what people give the options as
    "base": "INITIAL_CHECKPOINT_PATH",
    "config": "PRESET",
    "methods": "METHODS",
    "step": "STEP",
}
_TRAINED = "trained/"  # in the paths of a run's state
ADAPTER = "adapter"  # of a Hugging Face folder: the adapter file that belongs to it


@dataclasses.dataclass(frozen=True)
class Source:
    """What was read.

    Attributes:
        config: of the model.
        params: its whole parameter tree.
        step: the training step, 0 where none is known.
        vocabulary: fingerprint of the vocabulary of what was trained, None where it is not known.
        lengths: of the training's examples; see `save_adapter`.
        base: config and parameters of the base that it was trained from, where it was read.
        base_name: the base as it was given, None for none.
    """

    config: ModelConfig
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    step: int = 0
    vocabulary: str | None = None
    lengths: Mapping[str, int] | None = None
    base: tuple[ModelConfig, Mapping[str, Any]] | None = dataclasses.field(default=None, repr=False)
    base_name: str | None = None


def read_weighted(
    folders: Sequence[Path], weights: Sequence[float] | None, **options: Any
) -> Source:
    """What a folder holds, or one adapter in the place of those of several.

    Args:
        folders: of what is read.
        weights: one for each of several, None for a single one.
        **options: see `read_source`.

    Raises:
        ValueError: see `methods.combine_adapters`; or one holds more than an adapter, or they were
            trained with other vocabularies.
    """
    if len(folders) == 1 and weights is None:
        return read_source(folders[0], **options)
    if weights is None or len(folders) == 1:
        raise ValueError(f"WEIGHTS={weights!r} must be one for each of several in INPUT")
    read = [read_source(folder, **options) for folder in folders]
    if whole := [
        f for f, x in zip(folders, read, strict=True) if not (x.base and x.config.methods)
    ]:
        raise ValueError(f"{whole[0]} is no adapter of a base, and adapters alone are added")
    adapters = [(each.config, each.params) for each in read]
    config, params = methods_lib.combine_adapters(read[0].base[1], adapters, weights)
    vocabularies = {each.vocabulary for each in read} - {None}
    if len(vocabularies) > 1:
        raise ValueError(f"the adapters were trained with other vocabularies: {vocabularies}")
    lengths = [each.lengths for each in read]
    longest = {name: max(x[name] for x in lengths) for name in lengths[0]} if all(lengths) else None
    said = {"vocabulary": next(iter(vocabularies), None), "lengths": longest}
    step = max(each.step for each in read)
    return dataclasses.replace(read[0], config=config, params=params, step=step, **said)


def read_source(folder: Path, **options: Any) -> Source:
    """Reads what a folder holds; raises ValueError for options that mean nothing for it."""
    options = {name: value for name, value in options.items() if value is not None}
    found = [kind for file, kind in KINDS.items() if (folder / file).is_file()]
    if is_t5x(folder):
        found.append(("a T5X checkpoint", _read_t5x, ("base", "config", "methods", "step")))
    if not found:
        raise FileNotFoundError(f"{folder} is no T5X checkpoint and has none of {[*KINDS]}")
    if len(found) > 1:
        raise ValueError(f"{folder} is several things at once: {[kind[0] for kind in found]}")
    name, reader, allowed = found[0]
    unused = sorted(options.keys() - set(allowed))
    if unused:
        macros = ", ".join(_MACROS[option] for option in unused)
        raise ValueError(f"{folder} is {name}, which needs no {macros}")
    source = reader(folder, **options)
    trees.check_finite(trees.flatten(source.params))
    base = options.get("base")
    return dataclasses.replace(source, base_name=None if base is None else str(base))


def _read_hf(folder: Path) -> Source:
    if (folder / ADAPTER / MANIFEST).is_file():
        return _read_adapter(folder / ADAPTER, folder)
    return Source(*checkpoints.load_hf(folder))


def _read_adapter(folder: Path, base: str | os.PathLike | None = None) -> Source:
    manifest = read_manifest(folder)  # a damaged one is found before the base is read
    base_read = _known_base(base, folder)
    config, params = checkpoints.load_adapter(folder, *base_read)
    said = {name: manifest.get(name) for name in ("vocabulary", "lengths")}
    return Source(config, params, **said, base=base_read)


def _read_library(folder: Path, base: str | None = None) -> Source:
    is_hub = checkpoints.is_adapter_hub(folder)
    load = checkpoints.load_adapter_hub if is_hub else checkpoints.load_peft
    base_read = _known_base(base, folder)
    return Source(*load(folder, *base_read), base=base_read)


def _known_base(base: str | os.PathLike | None, source: Path) -> tuple[ModelConfig, Mapping]:
    """Config and parameters of a dense checkpoint; sizes may be read off its shapes."""
    config, params = _load_base(base, source)
    return config or infer_config(params, base), params


def _load_base(base: str | None, source: Path) -> tuple[ModelConfig | None, Mapping[str, Any]]:
    """The config, if it is known, and the parameters of a dense checkpoint."""
    if base is None:
        raise lacks_base(source)
    directory = hub.find(base)
    if (directory / CONFIG_FILE).is_file():
        return checkpoints.load_hf(directory)
    return None, read_t5x(directory)[0]


def _read_run(folder: Path, base: str | None = None, step: int | None = None) -> Source:
    """Reads a checkpoint of `coda train`: the trained leaves, and the frozen ones of its base.

    The optimizer's state is not read, nor are an objective's own leaves, which are in no model.
    """
    run = files.read_json(folder / RUN_FILE)
    config = _config_of(run, folder / RUN_FILE)
    steps = saved_steps(folder)
    if not steps or step not in (None, *steps):
        raise FileNotFoundError(f"{folder} has no checkpoint of {step=}. Steps found: {steps}")
    step = steps[-1] if step is None else step
    item = folder / CHECKPOINTS / str(step) / STATE
    stored = {path: array for path, array in list_orbax(item).items() if path.startswith(_TRAINED)}
    own = tuple(pattern for objective in OBJECTIVES.values() for pattern in objective.creates)
    stored = {
        path: array
        for path, array in stored.items()
        if not trees.matches(path.removeprefix(_TRAINED), own)
    }
    leaves = read_arrays(stored, item)
    if "format_version" in run:  # version 1 knew no digests
        _check_sound(item.parent, leaves)
    params = trees.unflatten({path.removeprefix(_TRAINED): x for path, x in leaves.items()})
    base_read = None
    if methods_lib.partition(config, param_shapes(config))[1]:
        base_config, base_params = _load_base(base, folder)
        base_read = base_config or config.dense(), base_params
        _check_base(run, config, base_params, folder, base)
        params = trees.merge(methods_lib.partition(config, base_params)[1], params)
    elif base is not None:
        raise ValueError(f"{folder} holds all leaves and needs no INITIAL_CHECKPOINT_PATH={base!r}")
    trees.check_tree(param_shapes(config), params, what=f"the leaves of {item} do")
    if run.get("quantization"):
        params = checkpoints.quantize(config, params, run["quantization"])
    finished = methods_lib.finish(config, params)
    said = {name: run.get(name) for name in ("vocabulary", "lengths")}
    return Source(*finished, step, **said, base=base_read)


def _check_sound(folder: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless leaves of a run's checkpoint are those that were saved."""
    try:
        check_leaves(read_contents(folder), leaves)
    except DamagedError as error:
        raise ValueError(f"{folder} is damaged: {error}. STEP takes an earlier one") from error


def _config_of(run: Mapping[str, Any], file: Path) -> ModelConfig:
    """The config of the model that a run.json describes."""
    try:
        version = run.get("format_version", 1)
        if version == 1:
            return from_version_1(run["model"], {}, file, run["trained"])
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version={version!r} is unknown")
        return from_json(run["config"], file)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not describe a model: {error}") from error


def _check_base(
    run: Mapping[str, Any], config: ModelConfig, params: Mapping, folder: Path, base: str | None
) -> None:
    """Raises ValueError unless the frozen leaves are those that a run was trained with."""
    if "format_version" not in run:
        found, expected = fingerprint_version_1(config, params), run.get("base")
        different = [] if found == expected else [f"the fingerprint {expected}, not {found}"]
    else:
        found, expected = base_fingerprints(config, params), run.get("base") or {}
        different = [path for path, sha256 in found.items() if expected.get(path) != sha256]
    if different:
        lines = "\n  ".join(different)
        raise ValueError(f"{folder} was trained from another base than {base}:\n  {lines}")


def _read_t5x(
    folder: Path,
    base: str | None = None,
    config: ModelConfig | None = None,
    methods: Sequence[Method] = (),
    step: int | None = None,
) -> Source:
    params, step = read_t5x(folder, step)
    config = config_of(folder, params, config, methods)
    partial = is_partial(config, trees.flatten(params))
    base_config, base_params = _load_base(base, folder) if base or partial else (None, None)
    if partial:
        params = trees.merge(params, frozen_leaves(config, folder, base, base_params))
    what = (
        f"with the methods {[method.name for method in config.methods]}, the leaves of {folder} do"
    )
    trees.check_tree(param_shapes(config), params, what=what)
    base_read = None
    if base is not None:
        params = onto_base(config, params, base_params, folder)
        base_read = base_config or config.dense(), base_params
    return Source(*methods_lib.finish(config, params), step, base=base_read)


def generation_files(read: Source, folders: list[Path]) -> dict[str, str]:
    """The first folder's generation_config.json, {name: path}, for a model that generates."""
    paths = [str(folder / GENERATION_CONFIG_FILE) for folder in folders]
    found = [path for path in paths if os.path.isfile(path)]
    return {GENERATION_CONFIG_FILE: found[0]} if found and read.config.num_decoder_layers else {}


def preprocessor_files(folders: Sequence[Path]) -> dict[str, str]:
    """The first folder's file that says how inputs are prepared, {name: path}."""
    return next(filter(None, map(preprocessing.find, folders)), {})


def vocabulary_files(read: Source, folders: list[Path]) -> dict[str, str]:
    """The files of the vocabulary of the first folder that has one, {name: path}.

    Raises:
        ValueError: it is not that with which what was read was trained.
    """
    for folder in folders:
        if (found := find_fingerprint(folder)) is None:
            continue
        if read.vocabulary not in (None, found):
            raise ValueError(
                f"{folders[0]} was trained with another vocabulary than that of {folder} "
                f"(SHA-256 {read.vocabulary}, {found})"
            )
        return find_files(folder)
    return {}


def hf_files(read: Source, folders: list[Path]) -> dict[str, str]:
    """What goes along with a model in Hugging Face's layout, {name: path}; see these three."""
    beside = vocabulary_files(read, folders) | generation_files(read, folders)
    return beside | preprocessor_files(folders)


KINDS = {  # by the file that tells: what a folder is, what reads it, the options that it takes
    CONFIG_FILE: ("a Hugging Face checkpoint", _read_hf, ()),
    MANIFEST: ("an adapter file", _read_adapter, ("base",)),
    LIBRARY_CONFIG: ("an adapter of peft or AdapterHub", _read_library, ("base",)),
    RUN_FILE: ("a run of coda train", _read_run, ("base", "step")),
}
