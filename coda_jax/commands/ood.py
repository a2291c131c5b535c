"""`coda ood`: does a model know which inputs are none of its task?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import importlib
import json
import os
from typing import Any

import jax
from jaxtyping import Float
import numpy as np
from tqdm import tqdm

from coda_jax import checks, files, processes
from coda_jax.commands.loading import LoadedModel, held_at_once
from coda_jax.commands.ood_data import FILES, Inputs, Targets, inside_and_outside
from coda_jax.data import jsonl
from coda_jax.data.labels import check_labels
from coda_jax.data.reports import say
from coda_jax.data.source import Data
from coda_jax.inference import Decoding
from coda_jax.objectives import model_for
from coda_jax.ood.detector import Detector
from coda_jax.ood.distances import SHRINKAGES, check_neighbours
from coda_jax.ood.known import HeldOut
from coda_jax.ood.metrics import FALSE_ALARMS, METRICS, detection, intervals, threshold
from coda_jax.ood.outputs import Made, Outputs
from coda_jax.optional import needs
from coda_jax.sharding import Placement

Scores = dict[str, Float[np.ndarray, " n"]]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How inputs are scored, and scores judged.

    Attributes:
        shrinkage: of the covariances, see `ood.distances`.
        neighbours: the number of the neighbour whose distance counts.
        false_alarms: the share of inputs in distribution that thresholds give up.
        bootstrap: samples from which intervals come.
        seed: of their draws, and of labels that are held out.
    """

    shrinkage: str = "ledoit_wolf"
    neighbours: int = 10
    false_alarms: float = 0.05
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self):
        checks.fields(
            self,
            shrinkage=checks.OneOf(tuple(SHRINKAGES)),
            neighbours=checks.COUNT,
            false_alarms=FALSE_ALARMS,
            bootstrap=checks.COUNT,
            seed=checks.SEED,
        )


def ood(
    model: LoadedModel,
    task: str,
    feature_lengths: Mapping[str, int] | None,
    decoding: Decoding,
    outside: Sequence[str] | str | None = None,
    held_out: HeldOut = None,
    split: str | None = None,
    scoring: Scoring = Scoring(),
    output: str | None = None,
    predictions: str | None = None,
    curves: str | None = None,
    detector: str | None = None,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Scores inputs of a task and others, and says how well each score tells them apart.

    The labels are the distinct targets of the training examples, or those of a model's head.
    Examples of others are left out, and inputs that are too long are cut; both are counted.

    Args:
        model: what is asked.
        task: name of a JSONL task, or of one of seqio, that has the split "train".
        feature_lengths: the most "inputs" that are kept, unless `decoding` says it.
        decoding: the size of batches and the longest input; nothing is generated.
        outside: sets out of distribution, one or several: files that `coda predict` reads (.jsonl,
            .txt), "TASK", "TASK:SPLIT", or ":SPLIT" of the same task.
        held_out: labels, or a share of them, that the model was not trained with: the examples of
            the split that have them are one more set.
        split: what is in distribution; None for "validation" or else the only one.
        scoring: how.
        output: JSON file for what is returned.
        predictions: JSONL file for each input, its "prediction" and its "scores".
        curves: PNG file for histograms of the scores and their ROC curves.
        detector: safetensors file for `coda predict`.
        placement: the devices; None for all, which share the rows of a batch.

    Returns:
        {"labels", "held_out", "examples" of the split, "accuracy", "thresholds": {score: value},
        "sets": {set: {"examples", score: {metric: {"value", "interval"}}}}}; see `ood.metrics`.

    Raises:
        ValueError: nothing is out of distribution, a set is empty, a label is unknown, the model
            cannot score labels, or examples are none of the model.
        FloatingPointError: an output is not finite; the number of its input is named.
    """
    data, decoding = _task(model, task, feature_lengths, decoding, split)
    outside = (outside,) if isinstance(outside, str) else tuple(outside or ())
    written = {"OUTPUT": output, "PREDICTIONS": predictions, "CURVES": curves, "DETECTOR": detector}
    _check_files(data, outside, written)
    labels, held, train, sets = inside_and_outside(model, data, outside, held_out, scoring.seed)
    check_neighbours(scoring.neighbours, len(train.tokens))
    made, found = _made(model, decoding, labels, train, sets, scoring, placement)
    scores = [found.scores(of_set) for of_set in made]
    report = _report(data, labels, held, sets, made, scores, scoring)
    print("\n".join(_table(report)))
    if processes.is_first():
        _write(written, report, sets, made, scores)
        _write_detector(detector, model, found, report["thresholds"])
    return report


def _task(model, task, feature_lengths, decoding: Decoding, split) -> tuple[Data, Decoding]:
    """The task and its split, which the model can take, and the limits of inputs in both."""
    with needs():
        importlib.import_module("sklearn")  # missed here, before anything is computed
    decoding.check_encodes()
    lengths = dict(feature_lengths or {})
    if decoding.max_input_length is not None:
        lengths["inputs"] = decoding.max_input_length
    data = Data(lengths, task, shuffle=False, batch_size=decoding.batch_size)
    data = data.with_split(split).limited(model.longest_inputs)
    data.check_vocabulary(**model.vocabulary)
    check_labels(task, model_for(model.config).describes)
    return data, dataclasses.replace(decoding, max_input_length=data.feature_lengths["inputs"])


def _check_files(data: Data, outside: Sequence[str], given: Mapping[str, str | None]) -> None:
    """Raises ValueError where a file cannot be written, or is read."""
    checks.paths(**given)
    written = [os.path.abspath(path) for path in given.values() if path is not None]
    if len({*written}) < len(written):
        raise ValueError(f"files that are written need names of their own: {written}")
    read = jsonl.TASKS[data.task].files.values() if data.task in jsonl.TASKS else ()
    for path in written:
        files.prepare(path, *read, *(entry for entry in outside if entry.endswith(FILES)))
    if given["CURVES"] is not None:
        _picture()  # what it needs is missed before anything is computed


def _picture():
    from coda_jax.profiling.detection import detection_picture  # Here: it imports matplotlib.

    return detection_picture


def _numbers(inputs: Inputs, labels: Mapping[str, Any]) -> np.ndarray:
    """The number of each one's label."""
    numbers = {label: number for number, label in enumerate(labels)}
    return np.array([numbers[label] for label in inputs.labels])


def _made(
    model: LoadedModel,
    decoding: Decoding,
    labels: Targets,
    train: Inputs,
    sets: Sequence[Inputs],
    scoring: Scoring,
    placement: Placement | None,
) -> tuple[list[Made], Detector]:
    """What the model makes of each set, and what it knows of the training examples."""
    targets = tuple(target for target in labels.values() if target is not None)
    outputs = Outputs(model.config, model.params, decoding, targets, placement)
    size = held_at_once(model, decoding)
    found = [_in_order(outputs, inputs, size) for inputs in sets]
    training = _in_order(outputs.features, train, size)
    for line in outputs.cuts():
        say(line)
    longest, options = decoding.max_input_length, (scoring.shrinkage, scoring.neighbours)
    return found, Detector(training, _numbers(train, labels), targets, longest, *options)


def _in_order(outputs: Callable[..., Iterator[tuple[int, Any]]], inputs: Inputs, size: int) -> Any:
    """What is made of all inputs, stacked in their order."""
    found: list[Any] = [None] * len(inputs.tokens)
    silent = not processes.is_first()
    with tqdm(total=len(found), desc=inputs.name, unit="example", disable=silent) as progress:
        for start in range(0, len(found), size):
            for index, made in outputs(inputs.tokens[start : start + size], first=start):
                found[start + index] = made
                progress.update()
    return jax.tree.map(lambda *values: np.stack(values), *found)


def _report(data, labels, held, sets, made, scores, scoring: Scoring) -> dict[str, Any]:
    """What `ood` returns."""
    options = {"resamples": scoring.bootstrap, "seed": scoring.seed}

    def with_intervals(metrics, *samples):
        ends = intervals(metrics, *samples, **options)
        return {
            name: {"value": value, "interval": [*ends[name]]}
            for name, value in metrics(*samples).items()
        }

    inside, *outside = scores
    right = made[0].logits.argmax(-1) == _numbers(sets[0], labels)
    accuracy = with_intervals(lambda x: {"accuracy": float(x.mean())}, right)
    report = {
        "task": data.task,
        "split": data.split,
        "examples": len(right),
        "labels": [*labels],
        "held_out": list(held),
        **accuracy,
        "false_alarms": scoring.false_alarms,
        "thresholds": {name: threshold(x, scoring.false_alarms) for name, x in inside.items()},
        "sets": {},
    }
    for inputs, of_set in zip(sets[1:], outside, strict=True):
        report["sets"][inputs.name] = {"examples": len(inputs.tokens)} | {
            name: with_intervals(detection, values, of_set[name]) for name, values in inside.items()
        }
    return report


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a report for people."""

    def shown(metric):
        low, high = metric["interval"]
        return f"{metric['value']:.3f} ({low:.3f} to {high:.3f})"

    yield (
        f"in distribution: {report['examples']:,} examples of {len(report['labels']):,} labels, "
        f"accuracy {shown(report['accuracy'])}"
    )
    for name, of_set in report["sets"].items():
        yield f"{name}: {of_set['examples']:,} examples"
        yield f"  {'':30}" + "".join(f"{metric:24}" for metric in METRICS)
        for score, metrics in of_set.items():
            if score != "examples":
                values = (f"{shown(metrics[metric]):24}" for metric in METRICS)
                yield f"  {score:30}" + "".join(values).rstrip()


def _write(written, report, sets, made, scores) -> None:
    """Writes the files for people that are asked for."""
    if (path := written["OUTPUT"]) is not None:
        files.write_json(path, report)
    if (path := written["PREDICTIONS"]) is not None:
        lines = _lines(report["labels"], sets, made, scores)
        texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        files.write_text(path, "".join(texts))
    if (path := written["CURVES"]) is not None:
        title = f"{report['task']}, split {report['split']!r}"
        with files.atomic(path) as new:
            _picture()(new, [inputs.name for inputs in sets], scores, title)


def _write_detector(
    path: str | None, model: LoadedModel, detector: Detector, thresholds: Mapping[str, float]
) -> None:
    """Writes the file for `coda predict`, if it is asked for."""
    if path is not None:
        detector = dataclasses.replace(detector, thresholds=thresholds)
        detector.save(path, model.config, model.params)


def _lines(labels, sets, made, scores) -> Iterator[dict[str, Any]]:
    """A line for each input of each set."""
    for inputs, found, of_set in zip(sets, made, scores, strict=True):
        for row, record in enumerate(inputs.records):
            yield {
                "set": inputs.name,
                **record,
                "prediction": labels[found.logits[row].argmax()],
                "scores": {name: float(values[row]) for name, values in of_set.items()},
            }
