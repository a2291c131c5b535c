"""`coda convert`: checkpoints from one layout to another, and the adapter file out of any of them.

What it reads is in `sources`. Several adapters of one base become one, with a weight for each. The
step goes along, the optimizer's state does not: a run goes on in the other trainer from its
parameters, with a fresh optimizer.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
from pathlib import Path

from coda_jax import checkpoints, checks, files, hub, trees
from coda_jax import methods as methods_lib
from coda_jax.checkpoints.huggingface import has_place
from coda_jax.checkpoints.t5x_scanned import to_scanned
from coda_jax.commands.model_card import write_card
from coda_jax.commands.sources import (
    ADAPTER,
    Source,
    hf_files,
    read_weighted,
    vocabulary_files,
)
from coda_jax.commands.t5x_identity import write_beside
from coda_jax.data.vocabularies import copy_files
from coda_jax.methods import Method
from coda_jax.models import ModelConfig
from coda_jax.nn.quantized import quantization_of


def convert(
    source: str | Sequence[str],
    output: str,
    layout: str,
    *,
    base: str | None = None,
    config: ModelConfig | None = None,
    methods: Sequence[Method] = (),
    step: int | None = None,
    encoder_only: bool = False,
    scan_layers: bool = False,
    weights: Sequence[float] | None = None,
) -> None:
    """Writes a checkpoint in another layout.

    Args:
        source: folder of what is converted, see `sources`; or the name of a model in the cache of
            the Hugging Face Hub, as `base` may be. Several, of adapters of one base, become one.
        output: folder to write, which must not exist yet or be empty, but in layout "t5x" may be a
            run's with other steps. In layout "hf" it gets the trained model, where its methods can
            be merged into the base; else the base as it was, and in its folder `adapter` the
            adapter file. In layout "t5x" it gets an orbax checkpoint `checkpoint_<step>` with all
            leaves under `target`, named as here; in the others an adapter file alone. A vocabulary
            and what says how to read and to decode, beside source or base, are copied, too.
        layout: "hf", "t5x", "adapter", "peft" or "adapter_hub".
        base: folder of the dense checkpoint, of Hugging Face's layout or T5X, that `source` was
            trained from, which one without frozen leaves needs. Those of T5X have to be the base's.
        config: sizes, for a T5X checkpoint; None for what its run's folder or its shapes tell.
        methods: how the model of a T5X checkpoint is adapted; () for what its run's folder says.
        step: takes the checkpoint of that step from a run; None for the newest.
        encoder_only: whether the encoder of an encoder-decoder is written alone.
        scan_layers: whether layers are stacked for T5X's scalable T5, with methods merged.
        weights: of several sources, one for each: see `methods.combine_adapters`.

    Raises:
        FileExistsError: if the output holds something.
        FileNotFoundError: if there is no such checkpoint, or files of it are missing.
        ValueError: an argument is unknown, missing or not used; leaves are missing, extra,
            misshapen or damaged (all are listed); the base is another one.
    """
    sources = _checked_sources(source)
    checks.paths(OUTPUT=output, INITIAL_CHECKPOINT_PATH=base)
    checks.OneOf([*WRITERS])("LAYOUT", layout)
    checks.Maybe(checks.Whole(0))("STEP", step)
    checks.flag("ENCODER_ONLY", encoder_only)
    write = _writer(layout, scan_layers)
    files.check_stores("OUTPUT", output) if layout == "t5x" else files.check_new(output)
    folders = [hub.find(each) for each in sources]
    options = {"base": base, "config": config, "methods": tuple(methods) or None, "step": step}
    read = read_weighted(folders, weights, **options)
    read = _encoder_of(read) if encoder_only else read
    beside = _copied(read, layout, [*folders, *([hub.find(base)] if base else [])])
    with (contextlib.nullcontext if layout == "t5x" else files.atomic_folder)(output) as new:
        note = write(Path(new), read)
        copy_files(beside, Path(new))
    step = f", step {read.step}" if read.step else ""
    said = f"{' + '.join(sources)}{step}, {trees.count(read.params):,} parameters"
    print(f"{said}, is now in {output} ({layout}{note})")


def _checked_sources(source: str | Sequence[str]) -> list[str]:
    """The names of what is read, one or several."""
    sources = source if isinstance(source, tuple | list) else [source]
    for each in sources or [""]:
        checks.paths(INPUT=each)
    return [*map(str, sources)]


def _copied(read: Source, layout: str, folders: list[Path]) -> dict[str, str]:
    """The files that go along, {name: path}: of a vocabulary, and how an "hf" model decodes."""
    beside = (hf_files if layout == "hf" else vocabulary_files)(read, folders)
    return beside if layout in ("hf", "t5x") else {}


def _encoder_of(read: Source) -> Source:
    config, params = checkpoints.encoder_of(read.config, read.params)
    base_read = checkpoints.encoder_of(*read.base) if read.base else None
    return dataclasses.replace(read, config=config, params=params, base=base_read)


def _write_hf(output: Path, read: Source) -> str:
    """Returns what is to be said of the folder, which transformers loads as if it were all."""
    config, params = methods_lib.merge(read.config, read.params)
    if not config.methods and not (read.base and not has_place(config)):
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
    saved, _ = methods_lib.partition(read.config, read.params)
    counts = trees.count(saved), trees.count(read.params)
    kind = quantization_of(read.params)
    write_card(output, read.config, counts, base=read.base_name, quantization=kind)
    return ""


def _write_peft(output: Path, read: Source) -> str:
    checkpoints.save_peft(output, read.config, read.params, base=read.base_name or "")
    return ""


def _write_adapter_hub(output: Path, read: Source) -> str:
    checkpoints.save_adapter_hub(output, read.config, read.params, base=read.base_name or "")
    return ", for load_adapter(..., use_safetensors=True)"


def _writer(layout: str, scan_layers: bool) -> Callable[[Path, Source], str]:
    """What writes a layout; raises ValueError where SCAN_LAYERS has no effect."""
    if not checks.flag("SCAN_LAYERS", scan_layers):
        return WRITERS[layout]
    if layout != "t5x":
        raise ValueError(f"SCAN_LAYERS=True is of LAYOUT='t5x', not of {layout!r}")
    return _write_scanned


WRITERS = {
    "hf": _write_hf,
    "t5x": _write_t5x,
    "adapter": _write_adapter,
    "peft": _write_peft,
    "adapter_hub": _write_adapter_hub,
}
