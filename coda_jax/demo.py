"""The main job on bundled data: adapt one checkpoint three ways with one budget, and compare.

`python -m coda_jax.demo` adapts the bundled checkpoint to `stdlib_module` (which module of Python's
standard library is this function from?) with the parallel adapter and with CoDA at r = 3 and 5,
from random windows of the training functions. It evaluates each on the held-out functions, times
all three side by side, and writes report.json, report.md and routing.png.
"""

import argparse
from collections.abc import Mapping
import functools
import itertools
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np
import optax

from coda_jax import answers, benchmark, bundled, data, params, plots, runs
from coda_jax.adapters import AdapterConfig
from coda_jax.inference import Decoding
from coda_jax.models import EncoderDecoder
from coda_jax.routing import CodaConfig
from coda_jax.run_files import write_atomically, write_report
from coda_jax.tasks import baselines, offline  # noqa: F401 (registers the tasks)
from coda_jax.training import TrainOptions

TASK = "stdlib_module"
FEATURE_LENGTHS = {"inputs": 512, "targets": 8}  # a whole function, the name of a module
TRAIN_TASK = "stdlib_module_windows"  # of the same task's training functions
TRAIN_LENGTHS = {"inputs": 128, "targets": 24}  # as in pretraining
STEPS = 2300
ROWS = 8  # of packed windows: on a CPU, many small steps teach more than few large ones
LEARNING_RATE = 3e-2
CODA_LEARNING_RATE = 1e-2  # conditional pretraining has trained these adapters already
MAX_SEGMENTS = 4  # windows in a row
TIMED_LENGTH = 1024
TIMED_BATCH = 4
REDUCTIONS = (3, 5)


def methods(random_base: bool = False) -> dict[str, runs.LoadedModel]:
    """The models to adapt, by name.

    Args:
        random_base: a control: the same shapes, with random numbers in place of the checkpoints'.
    """
    adapter = AdapterConfig(bottleneck=64)
    coda = CodaConfig(max_segments=MAX_SEGMENTS)
    if random_base:
        config = runs.load_model(str(bundled.DENSE)).config
        fresh = {"config": config, "adapter": adapter}
        models = {"parallel adapter": runs.load_model(**fresh)}
        for r in REDUCTIONS:
            models[f"CoDA r = {r}"] = runs.load_model(**fresh, coda=coda, reduction=r)
        return models
    models = {"parallel adapter": runs.load_model(str(bundled.DENSE), adapter=adapter)}
    for r in REDUCTIONS:
        models[f"CoDA r = {r}"] = runs.load_model(
            str(bundled.CODA), adapter_checkpoint=str(bundled.CODA / "adapter"), reduction=r
        )
    return models


def adapt(model: runs.LoadedModel, directory: pathlib.Path) -> runs.LoadedModel:
    """The model after adaptation; all are given the same examples in the same order."""
    peak = LEARNING_RATE if model.config.coda is None else CODA_LEARNING_RATE
    result, _ = runs.train(
        str(directory),
        model,
        data=runs.Data(TRAIN_LENGTHS, TRAIN_TASK, batch_size=ROWS, pack=True),
        options=TrainOptions(STEPS, save_every=STEPS),
        optimizer=optax.adam,
        learning_rate=optax.warmup_cosine_decay_schedule(0.0, peak, 50, STEPS),
    )
    return result


def measure(models: Mapping[str, runs.LoadedModel], rounds: int = 15) -> dict[str, dict[str, Any]]:
    """Latency, speed-up and FLOPs of encoder and of whole answers, on real tokens."""
    tokens = _timed_tokens()
    functions, flops = {}, {}
    for name, model in models.items():
        encode, predict = _programs(model)
        weights = jax.device_put(model.params)
        encode = jax.jit(encode).lower(weights, tokens).compile()
        flops[name] = benchmark.flops(encode)
        functions[f"encoder/{name}"] = functools.partial(encode, weights, tokens)
        functions[f"end_to_end/{name}"] = functools.partial(jax.jit(predict), weights, tokens)
    timings = benchmark.time_interleaved(functions, rounds)
    first = next(iter(models))
    report = {}
    for name in models:
        report[name] = {"flops_ratio": flops[first] / flops[name]}
        for part in ("encoder", "end_to_end"):
            timing, baseline = timings[f"{part}/{name}"], timings[f"{part}/{first}"]
            middle, low, high = benchmark.speed_up(baseline, timing)
            report[name] |= {
                f"{part}_ms": 1e3 * timing.median,
                f"{part}_speed_up": middle,
                f"{part}_speed_up_quartiles": [low, high],
            }
    return report


def _programs(model: runs.LoadedModel):
    """What is timed: (parameters, tokens) -> encoding, and -> answer."""
    answer = EncoderDecoder(model.config)

    def predict(params, tokens):
        return answer.predict(params, tokens, max_decode_length=FEATURE_LENGTHS["targets"])

    return answer.encode, predict


def _heldout(count: int) -> list[dict[str, np.ndarray]]:
    """Examples of the test split as tokens."""
    lengths = {"inputs": 4096, "targets": 64}
    examples = data.seqio_examples(
        TASK, "test", feature_lengths=lengths, seed=0, shuffle=True, num_epochs=1
    )
    return list(itertools.islice(examples, count))


def _timed_tokens() -> np.ndarray:
    """Held-out functions, one after the other, in rows of the timed length."""
    stream = np.concatenate([example["inputs"] for example in _heldout(100)])
    return stream[: TIMED_BATCH * TIMED_LENGTH].reshape(TIMED_BATCH, TIMED_LENGTH)


def draw_routing(model: runs.LoadedModel, path: pathlib.Path, count: int = 3) -> None:
    """The picture of what each layer takes, for held-out functions of medium length."""
    vocabulary = data.task_vocabulary(TASK)
    chosen = [e for e in _heldout(200) if 90 <= len(e["inputs"]) <= 220][:count]
    answer = EncoderDecoder(model.config)
    examples = []
    for example in chosen:
        tokens = example["inputs"]
        weights = np.asarray(answer.routing(model.params, tokens[None]))[:, 0]
        predicted = answer.predict(
            model.params, tokens[None], max_decode_length=FEATURE_LENGTHS["targets"]
        )
        right, found = (vocabulary.decode(t.tolist()) for t in (example["targets"], predicted[0]))
        heading = f"held-out function of {right}; answer: {found}"
        examples.append((heading, [_text(vocabulary, token) for token in tokens], weights))
    plots.routed_text(
        path,
        examples,
        f"Tokens that the encoder's layers work on, r = {model.config.coda.reduction} "
        "(the darker, the more layers)",
    )


def _text(vocabulary, token: int) -> str:
    """The characters of one token, for the listing."""
    piece = vocabulary.tokenizer.id_to_piece(int(token))
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    if byte:
        return chr(int(byte[1], 16))
    return "" if piece == "</s>" else piece.replace("▁", " ")


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table for people."""
    lines = [
        f"Held-out accuracy on `{TASK}`, {report['steps']} steps of adaptation each; speed at "
        f"{TIMED_LENGTH} input tokens, batch {TIMED_BATCH}, on {report['versions']['device']}.",
        "",
        "| | trained | accuracy | encoder | speed-up | FLOPs ratio | end to end | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["methods"].items():
        lines.append(
            f"| {name} | {row['trained_share']:.1%} | {row['accuracy']:.1f} % "
            f"| {row['encoder_ms']:.0f} ms | {row['encoder_speed_up']:.2f}x "
            f"| {row['flops_ratio']:.2f} | {row['end_to_end_ms']:.0f} ms "
            f"| {row['end_to_end_speed_up']:.2f}x |"
        )
    for name, accuracy in report["baselines"].items():
        lines.append(f"| {name.replace('_', ' ')} | | {accuracy:.1f} % | | | | | |")
    return "\n".join(lines) + "\n"


def run(directory: pathlib.Path, random_base: bool = False) -> dict[str, Any]:
    """Adapts, evaluates, times and reports; returns what report.json holds."""
    start = time.monotonic()
    rows, adapted = {}, {}
    for name, model in methods(random_base).items():
        print(f"\n== {name} ==", flush=True)
        folder = directory / re.sub(r"\W+", "_", name)
        adapted[name] = adapt(model, folder)
        metrics = answers.evaluate(
            adapted[name],
            TASK,
            FEATURE_LENGTHS,
            Decoding(max_decode_length=FEATURE_LENGTHS["targets"]),
            split="test",
        )
        trained, _ = params.partition(model.params, "adapters")
        share = params.count(trained) / params.count(model.params)
        rows[name] = {"accuracy": metrics[TASK]["accuracy"], "trained_share": share}
    for name, figures in measure(adapted).items():
        rows[name] |= figures
    report = {
        "task": TASK,
        "base": "random" if random_base else "bundled",
        "steps": STEPS,
        "methods": rows,
        "baselines": baselines.baselines(TASK),
        "seconds": time.monotonic() - start,
        "versions": benchmark.versions(),
    }
    draw_routing(adapted[f"CoDA r = {REDUCTIONS[0]}"], directory / "routing.png")
    write_report(directory / "report.json", report)
    write_atomically(directory / "report.md", markdown(report))
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--directory", default="build/demo", help="where the report is written")
    parser.add_argument(
        "--random_base", action="store_true", help="the control: start from random numbers"
    )
    arguments = parser.parse_args()
    directory = pathlib.Path(arguments.directory)
    report = run(directory, arguments.random_base)
    print(
        f"\n{markdown(report)}\n{report['seconds']:.0f} s; see {directory}/report.md, routing.png"
    )


if __name__ == "__main__":
    main()
