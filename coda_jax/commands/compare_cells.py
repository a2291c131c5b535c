"""The cells of `coda compare`: a recipe with a seed, trained and evaluated once, then kept."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import re
import time
from typing import Any

import numpy as np

from coda_jax import checks, files, methods, trees
from coda_jax.commands.command_lines import FILES, CommandLine, macros_of
from coda_jax.commands.evaluate import evaluate
from coda_jax.commands.gin_files import UsageError, read
from coda_jax.commands.loading import LoadedModel, load_model
from coda_jax.commands.model_card import made_by
from coda_jax.commands.train import train
from coda_jax.training.run_directory import EXPORT, RUN_FILE

SCORE = "score.json"  # in the folder of a cell that is finished
_CHECKPOINT, _ADAPTER = "INITIAL_CHECKPOINT_PATH", "INITIAL_ADAPTER_PATH"
_RUNS = {"train": "runs/finetune.gin", "evaluate": "runs/evaluate.gin"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recipe with a seed.

    Attributes:
        recipe: its name.
        seed: of the order of the data, fresh leaves and dropout.
        directory: of its run.
        training: what `coda train` is given.
        evaluation: what `coda evaluate` is given beside the model.
    """

    recipe: str
    seed: int
    directory: pathlib.Path
    training: CommandLine
    evaluation: CommandLine

    @property
    def is_finished(self) -> bool:
        """Whether its score is there."""
        return (self.directory / SCORE).exists()

    def kept(self) -> dict[str, Any]:
        """What was found of it; see `run`.

        Raises:
            ValueError: another command found it.
        """
        found = _read(self.directory / SCORE)
        commands = {
            "train": self.training.text("train"),
            "evaluate": self.answering().text("evaluate"),
        }
        for name, command in commands.items():
            if found[name] != command:
                raise ValueError(
                    f"{self.directory} holds what another command found: name another MODEL_DIR, "
                    f"or remove it\n  {found[name]}\n  {command}"
                )
        return found

    def answering(self) -> CommandLine:
        """What `coda evaluate` is given: the model as it was exported, and the task."""
        export = self.directory / EXPORT
        whole, adapter = (export / "config.json").exists(), export / "adapter"
        base = str(export) if whole else self.training.bindings[_CHECKPOINT]
        paths = {_CHECKPOINT: base} | ({_ADAPTER: str(adapter)} if adapter.exists() else {})
        return self.evaluation.plus(paths)

    def check(self) -> None:
        """Raises UsageError where its commands could not be carried out, as text tells."""
        self.training.configure("train")
        self.evaluation.plus({_CHECKPOINT: "x"}).configure("evaluate")

    def run(self) -> dict[str, Any]:
        """Trains and evaluates; a run that was cut off goes on.

        Returns:
            {"train", "evaluate"}: the commands; "task", "split": what is evaluated, None where the
            split is left open; "metrics": {metric: value}; "methods": their names;
            "trained", "total": parameters; "stored": those that a task needs beside the base, and
            that are not zero; "steps" of the training; "seconds", None for a run that was cut off.
        """
        began, start = self.directory.exists(), time.monotonic()
        model = self.fresh()
        trained, total = _sizes(model)
        with made_by(*self.training.words("train")):
            exported, _ = _configured(train)(model=model)
        seconds = None if began else time.monotonic() - start
        self.answering().configure("evaluate")
        metrics = _configured(evaluate)()
        found = {
            "train": self.training.text("train"),
            "evaluate": self.answering().text("evaluate"),
            "task": next(iter(metrics)),
            "split": self.evaluation.bindings.get("SPLIT"),
            "metrics": next(iter(metrics.values())),
            "methods": [method.name for method in model.config.methods],
            "trained": trained,
            "total": total,
            "stored": _stored(exported),
            "steps": _read(self.directory / RUN_FILE)["options"]["total_steps"],
            "seconds": seconds,
        }
        files.write_json(self.directory / SCORE, found)
        return found

    def exported(self) -> LoadedModel:
        """The model that answers."""
        self.answering().configure("evaluate")
        return _configured(load_model)()

    def fresh(self) -> LoadedModel:
        """The model before its training."""
        self.training.configure("train")
        return _configured(load_model)()


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _configured(function):
    """A function with the arguments that gin files give it."""
    import gin

    return gin.get_configurable(function)


def _sizes(model: LoadedModel) -> tuple[int, int]:
    """The parameters that are trained, and all."""
    trained, _ = methods.partition(model.config, model.params)
    return trees.count(trained), trees.count(model.params)


def _stored(model: LoadedModel) -> int:
    """The numbers of a task that are not zero: what its methods trained, or the whole model."""
    config, params = model.config, model.params
    leaves = methods.partition(config, params)[0] if config.methods else params
    return sum(int(np.count_nonzero(leaf)) for leaf in trees.flatten(leaves).values())


def plan(
    directory: pathlib.Path,
    recipes: Mapping[str, Any] | Sequence[str],
    seeds: Sequence[int],
    given: CommandLine,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> list[Cell]:
    """The cells, recipe by recipe.

    Args:
        directory: of all; each cell has a folder in it.
        recipes: {name: flags of `coda train`}, or names of files of methods/. "{seed}" in a text is
            the cell's seed.
        seeds: of each recipe.
        given: flags of both commands, as far as `coda evaluate` knows them; those of a recipe go
            before them.
        training: flags of `coda train`, which go behind those.
        evaluation: flags of `coda evaluate`.

    Raises:
        UsageError: what a cell is given is not understood, missing or without an effect.
        ValueError: there is no recipe, or two would share a folder.
    """
    recipes = _recipes(recipes)
    seeds = checks.Each(checks.SEED, 1)("SEEDS", seeds)
    folders = {name: re.sub(r"[^\w.-]+", "_", name).strip("_") for name in recipes}
    if len({*folders.values()} - {""}) < len(folders):
        raise ValueError(f"RECIPES would share folders or have none: {folders}")
    start = dataclasses.replace(given, gin_files=(_RUNS["train"], *given.gin_files), bindings={})
    trained = start.plus(training).plus(given.bindings)
    tasks = [name for name in trained.gin_files if _is_task(name, given.search_paths)]
    start = dataclasses.replace(start, gin_files=(_RUNS["evaluate"], *tasks))
    known = macros_of(start.gin_files, given.search_paths)
    evaluated = start.plus(given.only(known).bindings).plus(evaluation)
    for name, flags in {"TRAIN": training, **recipes}.items():
        if own := flags.keys() & {"SEED", "MODEL_DIR"}:
            raise UsageError(f"{name}: {sorted(own)} are SEEDS and MODEL_DIR of `coda compare`")
    cells = [
        Cell(
            name,
            seed,
            folder := directory / folders[name] / str(seed),
            trained.plus(_of_seed(flags, seed)).plus({"SEED": seed, "MODEL_DIR": str(folder)}),
            evaluated,
        )
        for name, flags in recipes.items()
        for seed in dict.fromkeys(seeds)
    ]
    for cell in cells:
        if cell.seed == seeds[0]:
            cell.check()
    return cells


def _recipes(recipes: Mapping[str, Any] | Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """{name: flags}."""
    if isinstance(recipes, Mapping):
        found = {str(name): flags for name, flags in recipes.items()}
    elif isinstance(recipes, list | tuple) and all(isinstance(x, str) for x in recipes):
        found = {name: {FILES: f"methods/{name}.gin"} for name in recipes}
    else:
        found = {}
    if not found or not all(isinstance(flags, Mapping) for flags in found.values()):
        shown = "a tuple of recipes such as ('full', 'coda'), or {name: {flag: value}}"
        raise checks.wrong("RECIPES", shown, recipes)
    return found


def _of_seed(flags: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Flags with a seed in their texts."""
    return {
        name: value.replace("{seed}", str(seed)) if isinstance(value, str) else value
        for name, value in flags.items()
    }


def _is_task(name: str, search_paths: Sequence[str]) -> bool:
    return read(name, search_paths).kind == "tasks"
