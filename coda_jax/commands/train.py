"""`coda train`: trains a model and exports what came out."""

from collections.abc import Callable, Mapping
import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax

from coda_jax import checkpoints, checks, files, methods, processes, trees
from coda_jax.checkpoints import own_layout
from coda_jax.commands.loading import LoadedModel, load_model
from coda_jax.commands.model_card import write_card
from coda_jax.data.epoch_steps import EPOCHS, steps_of
from coda_jax.data.examples import Expected, num_shared
from coda_jax.data.labels import check_labels
from coda_jax.data.reports import say
from coda_jax.data.source import Data
from coda_jax.data.vocabularies import copy_files, find_files
from coda_jax.models import ModelConfig, check_divides, family_of, preprocessing
from coda_jax.nn.quantized import quantization_of
from coda_jax.objectives import Model, model_for
from coda_jax.sharding import Placement
from coda_jax.training import run_directory, schedules, trainer
from coda_jax.training.distillation import Distillation
from coda_jax.training.metrics_file import EVALUATION, METRICS, read_metrics
from coda_jax.training.run_checkpoints import check_finite
from coda_jax.training.run_directory import EXPORT

CURVE = "learning_curve.png"  # in a run's folder


@dataclasses.dataclass(frozen=True)
class Distill:
    """The teacher as it is configured; see `Distillation`.

    Attributes:
        weight: w; None for no teacher.
        temperature: T; None for 1.
        adapter: the folder of the teacher's adapter, None for the base alone.
    """

    weight: float | None = None
    temperature: float | None = None
    adapter: str | None = None

    def of(
        self, student: LoadedModel, objective: Callable[[ModelConfig], Model]
    ) -> Distillation | None:
        """The teacher of a student; None where none is asked for.

        Raises:
            ValueError: an option without a weight, a value out of its range; see `load_teacher`.
        """
        checks.paths(TEACHER_ADAPTER_PATH=self.adapter)
        if self.weight is None:
            given = {"TEACHER_ADAPTER_PATH": self.adapter, "DISTILL_TEMPERATURE": self.temperature}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(
                        f"{name}={value!r} has no effect without DISTILL, the weight of the teacher"
                    )
            return None
        config, params = load_teacher(student, self.adapter)
        temperature = 1.0 if self.temperature is None else self.temperature
        return Distillation(objective(config), params, self.weight, temperature)


def load_teacher(
    student: LoadedModel, adapter_checkpoint: str | None
) -> tuple[ModelConfig, Mapping[str, Any]]:
    """The student's checkpoint without routing, with an adapter of its own or none.

    Leaves that are equal to the student's are the student's own arrays, so that they are in memory
    once; quantised as its are.

    Args:
        student: the model that is to follow it.
        adapter_checkpoint: folder that `save_adapter` wrote for the same checkpoint.

    Returns:
        (config, params) of the teacher.

    Raises:
        ValueError: the student starts at random, the adapter is for another base, or nothing has a
            head for the student's task.
    """
    if student.directory is None:
        raise ValueError("DISTILL: a model that starts at random has no teacher; name a checkpoint")
    config = student.config
    teacher = load_model(
        str(student.directory),
        adapter_checkpoint=adapter_checkpoint,
        dtype=config.dtype,
        encoder_only=not config.num_decoder_layers,
        quantize=quantization_of(student.params),
    )
    heads = [[getattr(x, name) for name in x.head_fields] for x in (config, teacher.config)]
    if heads[0] != heads[1]:
        raise ValueError(
            f"DISTILL: the student has the head {heads[0]}, the teacher {heads[1]}; "
            "TEACHER_ADAPTER_PATH must name an adapter of the same task"
        )
    ours = trees.flatten(student.params)

    def shared(path, leaf):
        return ours[path] if path in ours and np.array_equal(ours[path], leaf) else leaf

    params = {path: shared(path, leaf) for path, leaf in trees.flatten(teacher.params).items()}
    routed = methods.dense_routing(teacher.config.methods)
    return teacher.config.replace(methods=routed), trees.unflatten(params)


def train(
    directory: str,
    model: LoadedModel,
    data: Data,
    options: trainer.TrainOptions,
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: schedules.Rate,
    eval_data: Data | None = None,
    objective: Callable[[ModelConfig], Model] = model_for,
    export_dtype: Any = None,
    placement: Placement | None = None,
    distill: Distill | None = None,
    epochs: float | None = None,
) -> tuple[LoadedModel, dict[str, float]]:
    """Trains and exports into `directory`/export what `load_model` reads.

    A base that came out is in Hugging Face layout or its base's, what was trained in its `adapter`.

    Args:
        directory: of the run: checkpoints, logs, metrics, export.
        model: what to train; its methods say which leaves.
        data, eval_data: what to train and to evaluate on.
        options, optimizer, learning_rate: see `trainer.train`.
        objective: (config) -> the model with what it is trained for.
        export_dtype: of the leaves, where all were trained: float32 or bfloat16.
        placement: the devices; None for all, which share the rows of a batch.
        distill: the teacher, if any.
        epochs: passes over the data; None where `options` say the steps.

    Returns:
        The trained model, as it is exported, and its evaluation.

    Raises:
        ValueError: there is nothing to train, or data do not fit; see `trainer.train`.
    """
    directory = run_directory.checked(directory)
    export_dtype = checks.Maybe(checks.dtype)("export_dtype", export_dtype)
    trained, teacher = objective(model.config), distill and distill.of(model, objective)
    _check_options(model.config, data, options, epochs, placement or Placement())
    expected = _expected(trained, teacher)
    data, eval_data = _checked(model, trained, data, eval_data, expected)
    layout, said = {**model.layout, "expected": trained.expects}, _said(data, expected)
    batches = data.batches(repeat=True, **layout | {"expected": expected})
    params, metrics = trainer.train(
        trained,
        trained.add_leaves(model.params),
        batches,
        options=_lasting(options, epochs, data, expected, layout["max_segments"]),
        optimizer=optimizer,
        learning_rate=learning_rate,
        directory=directory,
        run=_identity(data, eval_data, said),
        eval_batches=eval_data and (lambda: eval_data.batches(repeat=False, **layout)),
        placement=placement,
        distillation=teacher,
    )
    data.report(batches)
    said |= {"base": model.checkpoint, "metrics": metrics}
    what = model.config, _exported(trained, params, export_dtype), model.directory
    return export(directory / EXPORT, *what, data, **said), _reported(metrics, directory)


def _check_lasts(options: trainer.TrainOptions, epochs: float | None) -> None:
    """Raises ValueError unless the run lasts so many steps, or else so many epochs."""
    checks.Maybe(EPOCHS)("EPOCHS", epochs)
    if (options.total_steps is None) == (epochs is None):
        raise ValueError(
            f"give TRAIN_STEPS or EPOCHS, one of the two: got {options.total_steps} and {epochs}"
        )


def _lasting(
    options: trainer.TrainOptions,
    epochs: float | None,
    data: Data,
    expected: Expected,
    max_segments: int | None,
) -> trainer.TrainOptions:
    """The options with the steps of so many epochs, which are said."""
    if epochs is None:
        return options
    steps = steps_of(data, epochs, expected, max_segments)
    count = len(data.chosen(expected))
    say(f"{data.place}: EPOCHS={epochs} of {count:,} examples are {steps:,} steps")
    return dataclasses.replace(options, total_steps=steps)


def _reported(metrics: dict[str, float], directory: pathlib.Path) -> dict[str, float]:
    """The metrics, which are written beside what was exported, drawn, and printed."""

    def write():
        files.write_json(directory / "metrics.json", metrics)
        _draw(directory)

    processes.from_first(write)
    print(f"exported to {directory / EXPORT}: {json.dumps(metrics, indent=2)}")
    return metrics


def _draw(directory: pathlib.Path) -> None:
    """Draws the run's `metrics.csv`, where there are one and matplotlib."""
    if not importlib.util.find_spec("matplotlib") or not (directory / METRICS).exists():
        return
    from coda_jax.profiling.learning_curve import learning_curve

    found = read_metrics(directory)
    evaluation = {
        name.removeprefix(EVALUATION): curve
        for name, curve in found.items()
        if name.startswith(EVALUATION)
    }
    try:
        with files.atomic(directory / CURVE) as path:
            learning_curve(path, found, evaluation, directory.resolve().name)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # the run has ended well
        say(f"there is no {CURVE}: {error}")


def _expected(trained: Model, teacher: Distillation | None) -> Expected:
    """What examples are to be learned: some teachers need no targets."""
    if teacher is None or teacher.reads_targets(trained):
        return trained.expects
    return dataclasses.replace(trained.expects, targets=None)


def _check_options(
    config: ModelConfig,
    data: Data,
    options: trainer.TrainOptions,
    epochs: float | None,
    placement: Placement,
) -> None:
    """Raises ValueError where devices cannot share the model or a batch, or no end is said."""
    _check_lasts(options, epochs)
    check_divides(config, placement)
    placement.check("BATCH_SIZE", data.batch_size, "data")
    parts = options.accumulation * placement.mesh.shape["data"]
    if data.batch_size % parts:
        raise ValueError(
            f"BATCH_SIZE must be a multiple of ACCUMULATION={options.accumulation} x "
            f"{placement.mesh.shape['data']} devices = {parts}, got {data.batch_size}"
        )


def _checked(
    model: LoadedModel, trained: Model, data: Data, eval_data: Data | None, expected: Expected
) -> tuple[Data, Data | None]:
    """The data with their limits, looked at; what there is to say of them is printed.

    Of what is trained on, `expected` is expected.

    Raises:
        ValueError: there is nothing to train on, data do not fit the model, a frozen model would
            stay random, or a base would come out that has no place in Hugging Face's layout.
    """
    if data.task is None and data.cache is None:
        raise ValueError("there is nothing to train on: name a task or a cache file")
    if not (methods.partition(model.config, model.params)[1] or own_layout.is_in(model.directory)):
        family_of(model.config).huggingface.format_config(model.config.dense(), "float32")
    if data.pack or (eval_data is not None and eval_data.pack):
        methods.check_packs(model.config.methods)
    methods.check_start(model.config, model.params, model.directory)
    if data.cache is None:
        data = data.with_split(data.split)
    if eval_data is not None and not eval_data.exists:
        what = eval_data.place if eval_data.task else "task for it"
        say(f"no evaluation during training: there is no {what}")
        eval_data = None
    sources = [read.limited(model.longest_inputs) for read in (data, eval_data) if read is not None]
    for read, needed in zip(sources, (expected, trained.expects), strict=False):
        if needed.targets is not None:
            read.check_vocabulary(**model.vocabulary)
            check_labels(read.task, trained.describes)
        read.check(needed)
    data, *rest = sources
    if rest and data.in_memory and rest[0].in_memory:
        shared = num_shared(rest[0].chosen(trained.expects), data.chosen(expected))
        if shared:
            say(f"{rest[0].place}: {shared:,} examples are among those trained on, too")
    return data, rest[0] if rest else None


def _said(data: Data, expected: Expected) -> dict[str, Any]:
    """What an adapter says of the data that it was trained on."""
    vocabulary = None if expected.targets is None else data.vocabulary_fingerprint()
    return {"vocabulary": vocabulary, "lengths": data.lengths(expected)}


def _exported(trained: Model, params: Any, dtype: Any) -> Any:
    """The network's own parameters; in a dtype, if one is given and all of them were trained."""
    _, params = trees.split(params, trained.creates)
    if dtype is None or methods.partition(trained.config, params)[1]:
        return params
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _identity(data: Data, eval_data: Data | None, said: dict[str, Any]) -> dict[str, Any]:
    """What of the data decides the result, and what it is evaluated on."""
    evaluated_on = eval_data and eval_data.description()
    return {"data": data.description(), "eval_data": evaluated_on, **said}


def export(
    folder: pathlib.Path,
    config: ModelConfig,
    params: Any,
    base_directory: pathlib.Path | None,
    data: Data,
    vocabulary: str | None,
    lengths: dict[str, int],
    *,
    base: str | None = None,
    metrics: dict[str, float] | None = None,
) -> LoadedModel:
    """Writes what was trained: the base, where its leaves were; what the methods leave behind.

    Args:
        folder: to write; it is replaced as a whole.
        config: of the model that was trained.
        params: its parameters.
        base_directory: of the checkpoint that it started from; a vocabulary there goes before that
            of the data.
        data: that it was trained on.
        vocabulary: the fingerprint of their vocabulary.
        lengths: of the training; see `checkpoints.save_adapter`.
        base: the checkpoint that it started from, as it was given, for the model card.
        metrics: of the evaluation, for the same.

    Returns:
        The model as it is exported.

    Raises:
        FloatingPointError: a leaf is not finite.
    """
    finished, params = methods.finish(config, params)
    trained, frozen = methods.partition(config, params)
    check_finite(trees.flatten(trained), f"nothing is exported to {folder}")

    def write():
        with files.atomic_folder(folder) as new:
            if not frozen:
                _, dense = trees.split(params, methods.created(finished))
                checkpoints.save_dense(new, finished.dense(), dense)
                beside = find_files(base_directory) if base_directory else {}
                beside = beside or data.vocabulary_files()
                copy_files(beside | preprocessing.find(base_directory or new), new)
            if finished.methods:
                said = {"vocabulary": vocabulary, "lengths": lengths}
                checkpoints.save_adapter(new / "adapter", finished, params, **said)
                own, _ = methods.partition(finished, params)
                counts = trees.count(own), trees.count(params)
                said = {
                    "base": base if frozen else None,
                    "task": data.task or data.cache,
                    "metrics": metrics,
                    "quantization": quantization_of(params),
                }
                write_card(new / "adapter", finished, counts, **said)

    processes.from_first(write)
    return LoadedModel(finished, params, base_directory, lengths=lengths, checkpoint=base)
