"""The cells of `coda compare`: a recipe with a seed, trained and judged once, then kept."""

from collections.abc import Mapping
import copy
import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

from coda_jax import files, methods, trees
from coda_jax.commands.command_lines import CommandLine
from coda_jax.commands.evaluate import evaluate
from coda_jax.commands.loading import LoadedModel, load_model
from coda_jax.commands.model_card import made_by
from coda_jax.commands.ood import ood
from coda_jax.commands.train import train
from coda_jax.data.source import Data
from coda_jax.objectives import model_for
from coda_jax.training.metrics_file import read_metrics
from coda_jax.training.run_directory import EXPORT
from coda_jax.training.trainer import TrainOptions

SCORE = "score.json"  # in the folder of a cell that is finished
DETECTION = "ood.json"  # beside it, where `coda ood` is asked for
CHECKPOINT, ADAPTER = "INITIAL_CHECKPOINT_PATH", "INITIAL_ADAPTER_PATH"
_MODEL = (CHECKPOINT, ADAPTER)
OUTPUT = "OUTPUT"
WRITTEN = {OUTPUT, "PREDICTIONS", "CURVES", "DETECTOR"}  # by `coda ood`


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recipe with a seed.

    Attributes:
        recipe: its name.
        seed: of the order of the data, fresh leaves and dropout.
        directory: of its run.
        training: what `coda train` is given.
        evaluation: what `coda evaluate` is given beside the model.
        detection: what `coda ood` is given beside the model; None: it is not asked.
    """

    recipe: str
    seed: int
    directory: pathlib.Path
    training: CommandLine
    evaluation: CommandLine
    detection: CommandLine | None = None

    @property
    def is_finished(self) -> bool:
        """Whether its score is there."""
        return (self.directory / SCORE).exists()

    def kept(self) -> Mapping[str, Any]:
        """What was found of it; see `run`.

        Raises:
            ValueError: another command found it.
        """
        found, commands = files.read_json(self.directory / SCORE), self._commands()
        for name in ("train", "evaluate", "ood"):
            old, new = found.get(name), commands.get(name)
            if old != new:
                raise ValueError(
                    f"{self.directory} holds what another command found: name another MODEL_DIR, "
                    f"or remove it\n  {old or f'no coda {name}'}\n  {new or f'no coda {name}'}"
                )
        return found

    def _commands(self) -> dict[str, str]:
        """What a person would type, once it is trained."""
        found = {
            "train": self.training.text("train"),
            "evaluate": self._answering().text("evaluate"),
        }
        return found | ({"ood": self._detecting().text("ood")} if self.detection else {})

    def _answering(self) -> CommandLine:
        """What `coda evaluate` is given: the model as it was exported, and the task."""
        return self.evaluation.plus(self._model())

    def _detecting(self) -> CommandLine:
        """What `coda ood` is given: that model, the task, and the file for its report."""
        written = {OUTPUT: str(self.directory / DETECTION)}
        return self.detection.plus(self._model() | written)

    def _model(self) -> dict[str, str]:
        """The flags of the model as it was exported."""
        export = self.directory / EXPORT
        whole, adapter = (export / "config.json").exists(), export / "adapter"
        base = str(export) if whole else self.training.bindings[CHECKPOINT]
        return {CHECKPOINT: base} | ({ADAPTER: str(adapter)} if adapter.exists() else {})

    def check(self) -> None:
        """Raises UsageError where its commands could not be carried out, as text tells."""
        self.training.configure("train")
        self.evaluation.plus({CHECKPOINT: "x"}).configure("evaluate")
        if self.detection is not None:
            self.detection.plus({CHECKPOINT: "x"}).configure("ood")

    def rehearse(self) -> None:
        """Loads the model and looks the evaluation's task up, for mistakes that these tell.

        Raises:
            ValueError: see `run`; or the steps are too few for the recipe's methods.
        """
        made_here = str(self.directory.parent.parent)  # by a cell before this one
        if any(self.training.bindings.get(x, "").startswith(made_here) for x in _MODEL):
            return
        model, options = self._start(), _configured(TrainOptions)()
        if options.total_steps is not None:
            options.check_model(model_for(model.config))
        self._answering().configure("evaluate")  # a task can have the checkpoint's vocabulary
        self._split(_bound(evaluate, "task"))

    def run(self) -> dict[str, Any]:
        """Trains and evaluates; a run that was cut off goes on.

        Returns:
            {"train", "evaluate", "ood"}: the commands; "task", "split": what is evaluated;
            "metrics": {metric: value}; "detection": see `_detected`; "methods": their names;
            "trained", "total": parameters; "stored": those that a task needs beside the base, and
            that are not zero; "steps" of the training; "seconds", None for a run that was cut off.

        Raises:
            ValueError: the model has a head for labels or numbers, or would be judged on what it
                was trained on.
        """
        began, start = self.directory.exists(), time.monotonic()
        model = self._start()
        trained, frozen = methods.partition(model.config, model.params)
        with made_by(*self.training.words("train")):
            exported, _ = _configured(train)(model=model)
        seconds = None if began else time.monotonic() - start
        self._answering().configure("evaluate")
        metrics = _configured(evaluate)()
        task, found = next(iter(metrics.items()))
        curves = read_metrics(self.directory).values()
        score = {
            **self._commands(),
            "task": task,
            "split": self._split(task),
            "metrics": {name: x for name, x in found.items() if isinstance(x, int | float)},
            **self._detected(),
            "methods": [method.name for method in model.config.methods],
            "trained": trees.count(trained),
            "total": trees.count(model.params),
            "stored": _stored(exported, whole=not frozen),
            "steps": max(step for curve in curves for step, _ in curve),
            "seconds": seconds,
        }
        files.write_json(self.directory / SCORE, score)
        return score

    def _start(self) -> LoadedModel:
        """The model before its training, which has no head."""
        model = self.fresh()
        if model_for(model.config).describes:
            raise ValueError("`coda compare` judges texts, and this model has a head for others")
        return model

    def _detected(self) -> dict[str, Any]:
        """{"detection": {"accuracy": value, "sets": {set: {score: {metric: value}}}}}, if asked."""
        if self.detection is None:
            return {}
        self._detecting().configure("ood")
        report = _configured(ood)()
        sets = {
            name: {
                score: {metric: found["value"] for metric, found in metrics.items()}
                for score, metrics in of_set.items()
                if score != "examples"
            }
            for name, of_set in report["sets"].items()
        }
        return {"detection": {"accuracy": report["accuracy"]["value"], "sets": sets}}

    def _split(self, task: str) -> str:
        """The split of a task that is evaluated."""
        asked = self.evaluation.bindings.get("SPLIT")
        split = Data({}, task).with_split(asked).split
        if split == "train" != asked:
            raise ValueError(
                f"{task} has no split but 'train': name other examples, such as VALIDATION_FILE, "
                "or --gin.EVALUATE=\"{'SPLIT': 'train'}\""
            )
        return split

    def exported(self) -> LoadedModel:
        """The model that answers."""
        self._answering().configure("evaluate")
        return _configured(load_model)()

    def fresh(self) -> LoadedModel:
        """The model before its training."""
        self.training.configure("train")
        return _configured(load_model)()


def _configured(function):
    """A function with the arguments that gin files give it."""
    import gin

    return gin.get_configurable(function)


def _bound(function, name: str) -> Any:
    """The value that gin files give an argument of a function."""
    import gin

    given = gin.get_bindings(function, resolve_references=False)[name]
    return copy.deepcopy(given)  # which is how gin looks references up


def _stored(model: LoadedModel, whole: bool) -> int:
    """The numbers of a task that are not zero: of the whole model, or what its methods trained."""
    leaves = model.params if whole else methods.partition(model.config, model.params)[0]
    return sum(int(np.count_nonzero(leaf)) for leaf in trees.flatten(leaves).values())
