"""`coda convert`: checkpoints from one layout to another, and the adapter file out of any of them.

What is converted is known by what its folder holds:
- `config.json`: a dense Hugging Face checkpoint, with the adapter file in its folder `adapter`, if
  there is one: so this command writes them;
- `adapter.json`: an adapter file, together with its base;
- `adapter_config.json`: a LoRA of the library peft, together with its base;
- `run.json`: a run of `coda train`, together with its base where only adapters were trained;
- a T5X checkpoint, or a run's folder of them. The config is not part of it: the run's folder says
  it, or else sizes are read off the shapes, and what adapters and routers do has to be said.

The step goes along, the optimizer's state does not: a run goes on in the other trainer from its
parameters, with a fresh optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from coda_jax import checkpoints, checks, files, hub, trees
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
from coda_jax.checkpoints.peft import CONFIG as PEFT_CONFIG
from coda_jax.checkpoints.t5x import is_t5x, read_t5x
from coda_jax.checkpoints.t5x_partial import frozen_leaves, is_partial, lacks_base, onto_base
from coda_jax.checkpoints.t5x_scanned import to_scanned
from coda_jax.checkpoints.zarr_arrays import list_orbax, read_arrays
from coda_jax.commands.t5x_identity import config_of, infer_config, write_beside
from coda_jax.data.vocabularies import copy_files, find_files, find_fingerprint
from coda_jax.methods import Method
from coda_jax.models import ModelConfig, family_of, param_shapes, preprocessing
from coda_jax.objectives import OBJECTIVES
from coda_jax.training.run_checkpoints import STATE, DamagedError, check_leaves, read_contents
from coda_jax.training.run_directory import (
    CHECKPOINTS,
    FORMAT_VERSION,
    RUN_FILE,
    read_run,
    saved_steps,
)

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
    """

    config: ModelConfig
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    step: int = 0
    vocabulary: str | None = None
    lengths: Mapping[str, int] | None = None
    base: tuple[ModelConfig, Mapping[str, Any]] | None = dataclasses.field(default=None, repr=False)


def convert(
    source: str,
    output: str,
    layout: str,
    *,
    base: str | None = None,
    config: ModelConfig | None = None,
    methods: Sequence[Method] = (),
    step: int | None = None,
    encoder_only: bool = False,
    scan_layers: bool = False,
) -> None:
    """Writes a checkpoint in another layout.

    Args:
        source: folder of what is converted, see the module; or the name of a model in the cache of
            the Hugging Face Hub, as `base` may be.
        output: folder to write, which must not exist yet or be empty, but in layout "t5x" may be a
            run's with other steps. In layout "hf" it gets the trained model, where its methods can
            be merged into the base; else the base as it was, and in its folder `adapter` the
            adapter file. In layout "t5x" it gets an orbax checkpoint `checkpoint_<step>` with all
            leaves under `target`, named as here; in layouts "adapter" and "peft" the adapter file
            alone, ours or that of the library peft. A vocabulary beside source or base is copied
            beside a checkpoint; in layout "hf" generation_ and preprocessor_config.json are, too.
        layout: "hf", "t5x", "adapter" or "peft".
        base: folder of the dense checkpoint, in Hugging Face layout or of T5X, that `source` was
            trained from. A source that holds only what was trained needs it. Given with a T5X
            checkpoint, the frozen leaves have to be the base's, and get its dtype again.
        config: sizes, for a T5X checkpoint; None for what its run's folder or its shapes tell.
        methods: how the model of a T5X checkpoint is adapted; () for what its run's folder says.
        step: takes the checkpoint of that step from a run; None for the newest.
        encoder_only: whether the encoder of an encoder-decoder is written alone.
        scan_layers: whether layers are stacked for T5X's scalable T5, methods merged into them.

    Raises:
        FileExistsError: if the output holds something.
        FileNotFoundError: if there is no such checkpoint, or files of it are missing.
        ValueError: if an argument is unknown, missing or not used by such a source; if leaves are
            missing, extra, misshapen or damaged (all are listed); if the base is another one.
    """
    checks.paths(INPUT=source, OUTPUT=output, INITIAL_CHECKPOINT_PATH=base)
    checks.OneOf([*WRITERS])("LAYOUT", layout)
    checks.Maybe(checks.Whole(0))("STEP", step)
    checks.flag("ENCODER_ONLY", encoder_only)
    write = _writer(layout, scan_layers)
    if layout == "t5x":
        files.check_stores("OUTPUT", output)
    else:
        files.check_new(output)
    folder = hub.find(source)
    read = read_source(folder, base=base, config=config, methods=tuple(methods) or None, step=step)
    read = _encoder_of(read) if encoder_only else read
    folders = [folder, *([hub.find(base)] if base else [])]
    beside = vocabulary_files(read, folders)
    if layout == "hf":
        beside |= generation_files(read, folders) | preprocessor_files(folders)
    with (contextlib.nullcontext if layout == "t5x" else files.atomic_folder)(output) as new:
        note = write(Path(new), read)
        if layout not in ("adapter", "peft"):
            copy_files(beside, Path(new))
    said = f"step {read.step}, {trees.count(read.params):,} parameters"
    print(f"{source}, {said}, is now in {output} ({layout}{note})")


def _encoder_of(read: Source) -> Source:
    config, params = checkpoints.encoder_of(read.config, read.params)
    base_read = checkpoints.encoder_of(*read.base) if read.base else None
    return dataclasses.replace(read, config=config, params=params, base=base_read)


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
    return source


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


def _read_peft(folder: Path, base: str | None = None) -> Source:
    base_read = _known_base(base, folder)
    return Source(*checkpoints.load_peft(folder, *base_read), base=base_read)


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
    run = read_run(folder)
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


def _write_hf(output: Path, read: Source) -> str:
    """Returns what is to be said of the folder, which transformers loads as if it were all."""
    config, params = methods_lib.merge(read.config, read.params)
    if not config.methods and not (read.base and _is_refused(config)):
        rate = read.base[0].dropout_rate if read.base else config.dropout_rate
        checkpoints.save_hf(output, config.replace(dropout_rate=rate), params)
        merged = [method.name for method in read.config.methods]
        return f", with {merged} merged into its weights" if merged else ""
    if read.base is None:  # its frozen leaves are there, and trained ones in the place of the rest
        _, dense = trees.split(read.params, methods_lib.created(read.config))
        checkpoints.save_hf(output, read.config.dense(), dense)
    else:
        checkpoints.save_hf(output, *read.base)
    _write_adapter(output / ADAPTER, read)
    return "; its weights are the base alone, and only coda_jax reads what was trained, in adapter/"


def _is_refused(config: ModelConfig) -> bool:
    """Whether a dense model is none of Hugging Face's, such as a T5 with a head."""
    try:
        family_of(config).huggingface.format_config(config, "float32")
    except ValueError:
        return True
    return False


def _write_t5x(output: Path, read: Source) -> str:
    write_beside(output, read.config)
    checkpoints.save_t5x(output, read.params, read.step)
    return ""


def _write_scanned(output: Path, read: Source) -> str:
    config, params = methods_lib.merge(read.config, read.params)
    stacked = to_scanned(config, params)
    write_beside(output, config)
    checkpoints.save_t5x(output, stacked, read.step)
    return ", of T5X's scalable T5"


def _write_adapter(output: Path, read: Source) -> str:
    said = {"vocabulary": read.vocabulary, "lengths": read.lengths}
    checkpoints.save_adapter(output, read.config, read.params, **said)
    return ""


def _write_peft(output: Path, read: Source) -> str:
    checkpoints.save_peft(output, read.config, read.params)
    return ""


def generation_files(read: Source, folders: list[Path]) -> dict[str, str]:
    """The first folder's generation_config.json, {name: path}, for a model that generates."""
    paths = [str(folder / GENERATION_CONFIG_FILE) for folder in folders]
    found = [path for path in paths if os.path.isfile(path)]
    return {GENERATION_CONFIG_FILE: found[0]} if found and read.config.num_decoder_layers else {}


def preprocessor_files(folders: list[Path]) -> dict[str, str]:
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


def _writer(layout: str, scan_layers: bool) -> Callable[[Path, Source], str]:
    """What writes a layout; raises ValueError where SCAN_LAYERS has no effect."""
    if not checks.flag("SCAN_LAYERS", scan_layers):
        return WRITERS[layout]
    if layout != "t5x":
        raise ValueError(f"SCAN_LAYERS=True is of LAYOUT='t5x', not of {layout!r}")
    return _write_scanned


WRITERS = {"hf": _write_hf, "t5x": _write_t5x, "adapter": _write_adapter, "peft": _write_peft}
KINDS = {  # by the file that tells: what a folder is, what reads it, the options that it takes
    CONFIG_FILE: ("a Hugging Face checkpoint", _read_hf, ()),
    MANIFEST: ("an adapter file", _read_adapter, ("base",)),
    PEFT_CONFIG: ("a LoRA of peft", _read_peft, ("base",)),
    RUN_FILE: ("a run of coda train", _read_run, ("base", "step")),
}
