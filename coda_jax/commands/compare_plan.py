"""From what `coda compare` is given to its cells: a recipe and a seed each."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any

from coda_jax import checks
from coda_jax.commands.command_lines import FILES, CommandLine, macros_of
from coda_jax.commands.compare_cells import ADAPTER, CHECKPOINT, WRITTEN, Cell
from coda_jax.commands.gin_files import UsageError, read

_TRAIN = "runs/finetune.gin"
_OF_CELLS = {"SEED", "MODEL_DIR"}  # macros of `coda train` that each cell has its own of


def plan(
    directory: pathlib.Path,
    recipes: Mapping[str, Any] | Sequence[str],
    seeds: Sequence[int],
    given: CommandLine,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    detection: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """The cells, recipe by recipe; those that are finished are of these commands.

    Args:
        directory: of all; each cell has a folder in it.
        recipes: {name: flags of `coda train`}, or names of files of methods/. In their texts
            "{seed}" is the cell's seed, and "{directory}" the folder of all.
        seeds: of each recipe.
        given: flags of `coda train`. Of `coda evaluate` and `coda ood` they are, as those of a
            recipe, as far as it knows them. Those of a recipe go before them.
        training: more flags of `coda train`, which go behind those.
        evaluation: more flags of `coda evaluate`, which go before those.
        detection: more flags of `coda ood`, which go before those; None: it is not asked.

    Raises:
        UsageError: what a cell is given is not understood, missing or without an effect.
        ValueError: there is no recipe, two would share a folder, or another command has found what
            a folder holds.
    """
    recipes = _recipes(recipes)
    for name, flags in {"TRAIN": training, "EVALUATE": evaluation, **recipes}.items():
        _check_flags(name, flags)
    seeds = checks.Each(checks.SEED, 1)("SEEDS", seeds)
    folders = {name: re.sub(r"[^\w.-]+", "_", name).strip("._") for name in recipes}
    if len({x.casefold() for x in folders.values()} - {""}) < len(folders):
        raise ValueError(f"RECIPES would share folders or have none: {folders}")
    _check_names(
        {"the command": given.bindings, "TRAIN": training, **recipes}, evaluation, detection
    )
    start = dataclasses.replace(given, gin_files=(_TRAIN, *given.gin_files), bindings={})
    shared = start.plus(training).plus(given.bindings)
    cells = []
    for name, flags in recipes.items():
        for seed in dict.fromkeys(seeds):
            folder = directory / folders[name] / str(seed)
            of_cell = {"SEED": seed, "MODEL_DIR": str(folder)}
            line = _filled(shared.plus(flags), seed, directory).plus(of_cell)
            if CHECKPOINT not in line.bindings:
                raise UsageError(
                    f"{name}: {CHECKPOINT} must be given, with --gin.{CHECKPOINT}=... or in TRAIN "
                    "or RECIPES"
                )
            passed_on = {*given.bindings, *flags} - {FILES}
            evaluating = _judging("evaluate", line, passed_on, evaluation)
            detecting = detection and _judging("ood", line, passed_on, detection)
            cells.append(Cell(name, seed, folder, line, evaluating, detecting))
    for cell in cells:
        if cell.seed == seeds[0]:
            cell.check()
        if cell.is_finished:
            cell.kept()
    return cells


def _recipes(recipes: Mapping[str, Any] | Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """{name: flags}."""
    if isinstance(recipes, Mapping):
        found = {str(name): flags for name, flags in recipes.items()}
    elif isinstance(recipes, list | tuple) and all(isinstance(x, str) for x in recipes):
        found = {name: {FILES: f"methods/{name}.gin"} for name in recipes}
        if len(found) < len(recipes):
            raise ValueError(f"RECIPES={tuple(recipes)} names one twice")
    else:
        found = {}
    if not found or not all(isinstance(flags, Mapping) for flags in found.values()):
        shown = "a tuple of recipes such as ('full', 'coda'), or {name: {flag: value}}"
        raise checks.wrong("RECIPES", shown, recipes)
    return found


def _check_flags(name: str, flags: Any) -> None:
    """Raises ValueError for what is no dictionary of flags with names of files."""
    if not isinstance(flags, Mapping) or not all(isinstance(x, str) for x in flags):
        raise checks.wrong(name, "flags such as {'TRAIN_STEPS': 1000}", flags)
    files = flags.get(FILES, ())
    if not isinstance(files, str) and not (
        isinstance(files, list | tuple) and all(isinstance(x, str) for x in files)
    ):
        raise checks.wrong(f"{FILES!r} of {name}", "a name of a file, or several", files)


def _check_names(
    training: Mapping[str, Mapping],
    evaluation: Mapping[str, Any],
    detection: Mapping[str, Any] | None,
) -> None:
    """Raises UsageError for flags that each cell has its own of, or that are missing."""
    for place, flags in training.items():
        if own := flags.keys() & _OF_CELLS:
            raise UsageError(f"{place}: {sorted(own)}: give SEEDS, and MODEL_DIR of all")
    if own := evaluation.keys() & {CHECKPOINT, ADAPTER}:
        raise UsageError(f"EVALUATE: {sorted(own)}: each cell evaluates what it has trained")
    if detection is None:
        return
    if not isinstance(detection, Mapping) or not detection.keys() & {"OOD", "HELD_OUT"}:
        shown = "flags of `coda ood` with sets out of distribution, such as {'OOD': 'others.jsonl'}"
        raise checks.wrong("OOD", shown, detection)
    if own := detection.keys() & {CHECKPOINT, ADAPTER, *WRITTEN}:
        raise UsageError(f"OOD: {sorted(own)}: each cell has its own model and files")


def _filled(line: CommandLine, seed: int, directory: pathlib.Path) -> CommandLine:
    """A line with the seed and the folder of all in its texts."""
    names = {"{seed}": str(seed), "{directory}": str(directory)}
    bindings = dict(line.bindings)
    for place, text in names.items():
        bindings = {name: value.replace(place, text) for name, value in bindings.items()}
    return dataclasses.replace(line, bindings=bindings)


def _judging(
    command: str, line: CommandLine, passed_on: set[str], flags: Mapping[str, Any]
) -> CommandLine:
    """What `coda evaluate` or `ood` is given, but for the model, after a line of `coda train`."""
    run = f"runs/{command}.gin"
    kinds = {name: read(name, line.search_paths).kind for name in line.gin_files}
    start = dataclasses.replace(line, bindings={})
    tasks = [name for name, kind in kinds.items() if kind == "tasks"]
    known = macros_of([run, *tasks], line.search_paths)
    own = []
    for name in (name for name, kind in kinds.items() if kind is None):
        macros = macros_of([name], line.search_paths)
        if macros <= known:
            own.append(name)
        elif both := sorted(macros & known):
            raise UsageError(
                f"{name} binds {both}, which `coda {command}` reads too, beside what it does not "
                "know: give them as flags, or in a file of their own"
            )
    start = dataclasses.replace(start, gin_files=(run, *tasks, *own))
    names = (passed_on & known) - {CHECKPOINT, ADAPTER}
    return start.plus(line.only(names).bindings).plus(flags)
