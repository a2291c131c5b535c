"""One checkpoint adapted several ways with one budget: quality, speed, a report and a picture.

Each demo says what it adapts to what (`Demo`); all else is the same for every family.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import itertools
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np
import optax

from coda_jax import files, methods, trees
from coda_jax.commands.evaluate import evaluate
from coda_jax.commands.loading import LoadedModel, load_model
from coda_jax.commands.train import train
from coda_jax.data import seqio_tasks
from coda_jax.data.source import Data
from coda_jax.inference import Decoding
from coda_jax.methods.comparisons import BASELINE, name_of
from coda_jax.objectives import model_for
from coda_jax.profiling import flops, timing
from coda_jax.training.schedules import warmup_cosine
from coda_jax.training.trainer import TrainOptions

TIMED_POSITIONS = 4096  # the most tokens, patches or frames in a timed batch
METRIC_NAMES = {"wer": "word error rate"}  # where a metric's own name is not enough
WARM_UP_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Demo:
    """What is adapted to what, and how.

    Attributes:
        task: the seqio task; the answers to its test split are judged.
        feature_lengths: of its examples in evaluation.
        train_data: what all models are adapted on, in the same order.
        steps: of adaptation.
        learning_rate: the peak, for the parallel adapter.
        coda_learning_rate: the peak, for CoDA.
        dense: folder of the dense checkpoint.
        coda: folder of the same after conditional pretraining, with its `adapter`.
        reductions: r of each CoDA model.
        timed_inputs: (rows B, length N) -> [B, N, ...] inputs of the encoder.
        timed_lengths: the N at which the models are timed, the most telling one first.
        draw: writes the picture of a model's routing to a path.
        metric: the one of the task's metrics that is reported, in per cent.
        baselines: the metric of other methods, to set beside.
    """

    task: str
    feature_lengths: Mapping[str, int]
    train_data: Data
    steps: int
    learning_rate: float
    coda_learning_rate: float
    dense: pathlib.Path
    coda: pathlib.Path
    reductions: tuple[int, ...]
    timed_inputs: Callable[[int, int], np.ndarray]
    timed_lengths: tuple[int, ...]
    draw: Callable[[LoadedModel, pathlib.Path], None]
    metric: str = "accuracy"
    baselines: Callable[[], dict[str, float]] = dict

    @property
    def decoding(self) -> Decoding:
        """Greedy, as long as the targets are."""
        return Decoding(max_decode_length=self.feature_lengths["targets"])


def compared(demo: Demo, random_base: bool = False) -> dict[str, LoadedModel]:
    """The models to adapt, by name, the parallel adapter first.

    Args:
        demo: what is adapted.
        random_base: a control: the same shapes, with random numbers in place of the checkpoints'.
    """
    base: dict[str, Any] = {"checkpoint": str(demo.dense)}
    routed: dict[str, Any] = {
        "checkpoint": str(demo.coda),
        "adapter_checkpoint": str(demo.coda / "adapter"),
    }
    config = load_model(**routed).config
    if random_base:
        base = {"config": config.dense()}
        routed = base | {"methods": config.methods}
    loaded = {BASELINE: load_model(**base, methods=methods.unrouted(config.methods))}
    for r in demo.reductions:
        loaded[name_of(r)] = load_model(**routed, reduction=r)
    return loaded


def reduction_of(model: LoadedModel) -> float:
    """r of a CoDA model, one number for all layers."""
    return next(m.reduction for m in model.config.methods if isinstance(m, methods.Coda))


def adapt(demo: Demo, model: LoadedModel, directory: pathlib.Path) -> LoadedModel:
    """The model after adaptation; all are given the same examples in the same order."""
    routes = methods.unrouted(model.config.methods) != model.config.methods
    peak = demo.coda_learning_rate if routes else demo.learning_rate
    result, _ = train(
        str(directory),
        model,
        data=demo.train_data,
        options=TrainOptions(demo.steps, save_every=demo.steps),
        optimizer=optax.adam,
        learning_rate=warmup_cosine(peak, demo.steps, WARM_UP_STEPS),
    )
    return result


def score(demo: Demo, model: LoadedModel) -> float:
    """The demo's metric of the answers to the test split, in per cent."""
    found = evaluate(model, demo.task, demo.feature_lengths, demo.decoding, split="test")
    return found[demo.task][demo.metric]


def timed_rows(length: int) -> int:
    """How many inputs of a length are timed at once."""
    return TIMED_POSITIONS // length


def measure(
    adapted: Mapping[str, LoadedModel],
    inputs: np.ndarray,
    max_decode_length: int,
    rounds: int = 15,
) -> dict[str, dict[str, Any]]:
    """Latency, speed-up and FLOPs of encoder and of whole answers; the first model is the baseline.

    Args:
        adapted: the models by name.
        inputs: of the encoder, [B, N, ...].
        max_decode_length: of the answers.
        rounds: runs of each program that are counted.
    """
    functions, operations = {}, {}
    for name, model in adapted.items():
        answer, weights = model_for(model.config), jax.device_put(model.params)
        encode = jax.jit(answer.encode).lower(weights, inputs).compile()
        predict = jax.jit(functools.partial(answer.predict, max_decode_length=max_decode_length))
        operations[name] = flops.encoder_flops(model.config, *inputs.shape[:2])
        functions[f"encoder/{name}"] = functools.partial(encode, weights, inputs)
        functions[f"end_to_end/{name}"] = functools.partial(predict, weights, inputs)
    timings = timing.time_interleaved(functions, rounds)
    first = next(iter(adapted))
    report: dict[str, dict[str, Any]] = {}
    for name in adapted:
        report[name] = {"flops_ratio": operations[first] / operations[name]}
        for part in ("encoder", "end_to_end"):
            taken, baseline = timings[f"{part}/{name}"], timings[f"{part}/{first}"]
            middle, low, high = timing.speed_up(baseline, taken)
            report[name] |= {
                f"{part}_ms": 1e3 * taken.median,
                f"{part}_speed_up": middle,
                f"{part}_speed_up_quartiles": [low, high],
            }
    return report


def heldout(task: str, feature_lengths: Mapping[str, int], count: int) -> list[dict[str, Any]]:
    """Examples of a task's test split, in a random order that is always the same."""
    examples = seqio_tasks.seqio_examples(
        task, "test", feature_lengths=feature_lengths, seed=0, shuffle=True, num_epochs=1
    )
    return list(itertools.islice(examples, count))


def routed_answers(
    model: LoadedModel, inputs: Sequence[np.ndarray], max_decode_length: int
) -> list[tuple[np.ndarray, list[int]]]:
    """What a model makes of each input [n, ...]: its routing's weights [layers, n], its answer."""
    module = model_for(model.config)

    @jax.jit
    def run(params, rows):
        answers = module.predict(params, rows, max_decode_length=max_decode_length)
        return module.routing(params, rows), answers

    longest = max(len(row) for row in inputs)
    rows = [np.pad(row, [(0, longest - len(row))] + [(0, 0)] * (row.ndim - 1)) for row in inputs]
    weights, answers = (np.asarray(found) for found in run(model.params, np.stack(rows)))
    return [(weights[:, i, : len(row)], answers[i].tolist()) for i, row in enumerate(inputs)]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables for people; the metric stands beside the speed at the first length."""
    first, *others = report["timed_lengths"]
    metric = METRIC_NAMES.get(report["metric"], report["metric"])
    speed = "encoder | speed-up | FLOPs ratio | end to end | speed-up |"
    lines = [
        f"Held-out {metric} on `{report['task']}`, {report['steps']} steps of adaptation each; "
        f"speed at input length {first}, batch {timed_rows(first)}, on "
        f"{report['versions']['device']}.",
        "",
        f"| | trained | {metric} | {speed}",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["methods"].items():
        cells = f"{row['trained_share']:.1%} | {row['score']:.1f} % | {_speed(row, first)}"
        lines.append(f"| {name} | {cells} |")
    for name, percent in report["baselines"].items():
        lines.append(f"| {name.replace('_', ' ')} | | {percent:.1f} % | | | | | |")
    for length in others:
        at = f"At input length {length}, batch {timed_rows(length)}:"
        lines += ["", at, "", f"| | {speed}", "|---|---|---|---|---|---|"]
        for name, row in report["methods"].items():
            lines.append(f"| {name} | {_speed(row, length)} |")
    return "\n".join(lines) + "\n"


def _speed(row: Mapping[str, Any], length: int) -> str:
    at = row["speed"][str(length)]
    return (
        f"{at['encoder_ms']:.0f} ms | {at['encoder_speed_up']:.2f}x | {at['flops_ratio']:.2f} "
        f"| {at['end_to_end_ms']:.0f} ms | {at['end_to_end_speed_up']:.2f}x"
    )


def run(demo: Demo, directory: pathlib.Path, random_base: bool = False) -> dict[str, Any]:
    """Adapts, evaluates, times, reports and draws; returns what report.json holds."""
    start = time.monotonic()
    rows: dict[str, dict[str, Any]] = {}
    adapted = {}
    for name, model in compared(demo, random_base).items():
        print(f"\n== {name} ==", flush=True)
        adapted[name] = adapt(demo, model, directory / re.sub(r"\W+", "_", name))
        trained, _ = methods.partition(model.config, model.params)
        share = trees.count(trained) / trees.count(model.params)
        rows[name] = {
            "score": score(demo, adapted[name]),
            "trained_share": share,
            "speed": {},
        }
    for length in demo.timed_lengths:
        inputs = demo.timed_inputs(timed_rows(length), length)
        for name, figures in measure(adapted, inputs, demo.decoding.max_decode_length).items():
            rows[name]["speed"][str(length)] = figures
    report = {
        "task": demo.task,
        "metric": demo.metric,
        "base": "random" if random_base else "bundled",
        "steps": demo.steps,
        "timed_lengths": list(demo.timed_lengths),
        "methods": rows,
        "baselines": demo.baselines(),
        "seconds": time.monotonic() - start,
        "versions": timing.versions(),
    }
    demo.draw(adapted[name_of(demo.reductions[0])], directory / "routing.png")
    files.write_json(directory / "report.json", report)
    files.write_text(directory / "report.md", markdown(report))
    return report


def main(demo: Demo, default_directory: str) -> None:
    """The command line of a demo."""
    parser = argparse.ArgumentParser(description="Adapts a bundled checkpoint several ways.")
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path(default_directory))
    parser.add_argument("--random_base", action="store_true", help="the control; see the README")
    options = parser.parse_args()
    report = run(demo, options.directory, options.random_base)
    print("\n" + markdown(report))
    print(f"{report['seconds']:.0f} s; see {options.directory}/report.md and routing.png")
