"""Our speed beside that of other engines: one machine, one process, the same weights, in turns.

    python -m venv .venv-peers && python -m venv .venv-older
    .venv-peers/bin/pip install -e . -r benchmarks/requirements.txt
    .venv-older/bin/pip install -r benchmarks/requirements_older.txt
    .venv-peers/bin/python -m benchmarks.peers.prepare FOLDER --preset=t5_1_1_base
    .venv-older/bin/python benchmarks/peers/export_onnx.py FOLDER
    .venv-peers/bin/python -m benchmarks.peers FOLDER --json=benchmarks/results/cpu_peers.json

All from the root of the repository. Every batch size with every input length is a case; other lists
of them are options. A run adds to the file of an earlier one, case by case, so a long table can be
measured in pieces, also of some engines at a time. The first engine is always among them, and
ratios are those within a run. `--show` prints the tables of a file, and measures nothing.

Of every engine: the encoder alone where the engine has a call for that, and greedy answers, of
which that of one token is encoder, keys and values of the encoding, and a step. Engines take turns,
and one begins when no thread of the one before it spins any more.
"""

import argparse
from collections.abc import Callable
import functools
from importlib import import_module, metadata
import itertools
import json
import os
import pathlib
import time

import numpy as np
from tqdm import tqdm

from benchmarks.peers import tables
from benchmarks.peers.engine import HUGGING_FACE, THREADS, Case, Engine

os.environ["KERAS_BACKEND"] = "jax"
PACKAGES = ("jax", "ctranslate2", "onnxruntime", "torch", "transformers", "keras", "keras-hub")


def _engine(module: str, **options) -> Callable[[Case], Engine]:
    """A function of a case that loads an engine; its module is imported then."""
    return lambda case: import_module(f"benchmarks.peers.{module}").load(case, **options)


ENGINES = {
    tables.REFERENCE: _engine("coda_jax_engine"),
    "ours bfloat16": _engine("coda_jax_engine", dtype="bfloat16"),
    **{
        f"ours r={r} {dtype}": _engine("coda_jax_engine", dtype=dtype, reduction=r)
        for dtype in ("float32", "bfloat16")
        for r in (3, 5, 8)
    },
    "CTranslate2 float32": _engine("ctranslate2_engine", precision="float32"),
    "CTranslate2 int8": _engine("ctranslate2_engine", precision="int8"),
    "ONNX Runtime float32": _engine("onnxruntime_engine", precision="float32"),
    "ONNX Runtime int8": _engine("onnxruntime_engine", precision="int8"),
    "torch float32": _engine("torch_engine"),
    "torch.compile float32": _engine("torch_engine", compiled=True),
    "keras-hub float32": _engine("keras_hub_engine"),
}


def measures(engine: Engine, lengths: list[int]) -> dict[str, Callable[[], np.ndarray]]:
    """What is timed of an engine, by name."""
    found = {}
    if engine.encode is not None:
        found[tables.ENCODER] = engine.encode
    if engine.generate is not None:
        for length in lengths:
            found[tables.answer(length)] = functools.partial(engine.generate, length)
    return found


def settle(limit: float = 2.0) -> None:
    """Waits until this process computes no more: pools of threads spin for a while after a call.

    Raises:
        RuntimeError: some thread still spins after `limit` seconds; the next engine would suffer.
    """
    for _ in range(round(limit / 0.1)):
        before = time.process_time()
        time.sleep(0.1)
        if time.process_time() - before < 0.01:
            return
    raise RuntimeError(f"a thread of the engine before still spins after {limit} s")


def time_all(calls: dict[str, dict[str, Callable]], rounds: int) -> tuple[dict, dict]:
    """Runs every measure of every engine once, then in turns.

    Returns:
        ({measure: {engine: seconds of the rounds}}, {measure: {engine: the first run's output}}).
    """
    pairs = [(measure, name) for measure, engines in calls.items() for name in engines]
    seconds = {measure: {name: [] for name in engines} for measure, engines in calls.items()}
    outputs: dict = {measure: {} for measure in calls}
    with tqdm(total=(1 + rounds) * len(pairs), unit="run") as progress:
        for round_number in range(1 + rounds):
            for measure, name in pairs:
                progress.set_description(f"{'warm-up' if not round_number else 'timing'}: {name}")
                settle()
                start = time.perf_counter()
                output = calls[measure][name]()
                taken = time.perf_counter() - start
                if round_number:
                    seconds[measure][name].append(round(taken, 5))
                else:
                    outputs[measure][name] = output
                progress.update()
    return seconds, outputs


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?", help="of benchmarks.peers.prepare")
    parser.add_argument("--input_lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--target_lengths", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=[*ENGINES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="file to which the report is added")
    parser.add_argument("--show", action="store_true", help="print the tables of --json")
    options = parser.parse_args()
    report = {"cases": {}}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    if not options.show:
        chosen = [name for name in ENGINES if name in {*options.engines, tables.REFERENCE}]
        for shape in itertools.product(options.batch_sizes, options.input_lengths):
            measure_case(report, options, shape, chosen)
            if options.json:
                options.json.write_text(tables.compact(report))
    print(tables.markdown(report))


def measure_case(
    report: dict, options: argparse.Namespace, shape: tuple[int, int], engines: list[str]
) -> None:
    """Measures a batch size and input length, and puts the figures in their place in the report."""
    config = json.loads((options.folder / HUGGING_FACE / "config.json").read_text())
    inputs = np.random.default_rng(0).integers(2, config["vocab_size"], shape).astype(np.int32)
    case = Case(options.folder, inputs)
    calls: dict = {}
    for name in tqdm(engines, desc="loading", unit="engine", leave=False):
        for measure, call in measures(ENGINES[name](case), options.target_lengths).items():
            calls.setdefault(measure, {})[name] = call
    seconds, outputs = time_all(calls, options.rounds)
    tables.add(report, options.folder.name, shape, seconds, outputs)
    report["threads"] = THREADS
    report["versions"] = {name: metadata.version(name) for name in PACKAGES}


if __name__ == "__main__":
    main()
