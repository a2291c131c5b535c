"""Every kind of method through T5X, killed and resumed, evaluated, inferred and converted.

Run with T5X's checkout on PYTHONPATH, as `make test-t5x` does; each method takes some minutes. The
table of docs/t5x.md is what `python -m pytest -m "" -n 0 -s tests/t5x/test_t5x_methods.py` prints.
"""

import json
import os
import re
import signal
import subprocess
import time

import gin
import numpy as np
import pytest
import seqio
from t5x_programs import VOCABULARY, coda_command

from coda_jax import bundled, cli, methods, trees
from coda_jax.checkpoints.t5x import read_t5x
from coda_jax.checkpoints.t5x_record import read_record, run_folder
from coda_jax.commands import convert
from coda_jax.tasks import offline  # noqa: F401 (the tasks)

pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)

LAST, PERIOD = 30, 10
# {name: (recipe, what else is given)}
METHODS = {
    "full fine-tuning": ("full", {}),
    "parallel adapter": ("parallel_adapter", {}),
    "LoRA": ("lora", {}),
    "DoRA": ("dora", {}),
    "Houlsby adapters": ("houlsby_adapter", {}),
    "prefix tuning": ("prefix_tuning", {}),
    "norms alone": ("norms", {}),
    "SPLoRA at half the density": (
        "structured_pruning",
        {
            "DENSITY": 0.5,
            "StructuredPruning.start": 5,
            "StructuredPruning.steps": 15,
            "StructuredPruning.every": 5,
        },
    ),
    "CoDA, r = 3": ("coda", {"REDUCTION": 3}),
    "CoDA, r = 5": ("coda", {"REDUCTION": 5}),
    "CoDA, r = 3, cross-attention to selected tokens": ("coda_selected", {"REDUCTION": 3}),
    "CoDA, r = 3, and LoRA": (
        "coda",
        {"REDUCTION": 3, "METHODS": ("lora", "coda", "parallel_adapter")},
    ),
}


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    """A folder with the bundled dense model as T5X's, and functions with their summaries."""
    folder = tmp_path_factory.mktemp("methods")
    convert.convert(str(bundled.DENSE), str(folder / "dense"), "t5x")
    source = seqio.TaskRegistry.get("stdlib_summary").source
    for split, count in (("train", 400), ("validation", 32)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for example in source.get_dataset(split, shuffle=False).take(count).as_numpy_iterator():
                line = {name: text.decode() for name, text in example.items()}
                file.write(json.dumps(line) + "\n")
    return folder


class Programs:
    """`coda t5x` for one method, in a folder."""

    def __init__(self, folder, name):
        recipe, self._given = METHODS[name]
        self.folder, self._recipe = folder, recipe
        self.place = folder / re.sub(r"\W+", "_", name)

    def _line(self, program, **given):
        given = {
            "PRESET": "t5_1_1_stdlib",
            "VOCABULARY": VOCABULARY,
            "TASK_FEATURE_LENGTHS": {"inputs": 128, "targets": 32},
            "VALIDATION_FILE": self.folder / "validation.jsonl",
            **self._given,
            **given,
        }
        run = {"train": "finetune"}.get(program, program)
        files = [f"t5x/{run}.gin", f"methods/{self._recipe}.gin", "tasks/jsonl.gin"]
        return coda_command(program, files, given)

    def start(self, program, **given):
        """The process of a program, with one device; its errors go to a file."""
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        self.place.mkdir(exist_ok=True)
        with (self.place / f"{program}.log").open("w") as log:
            return subprocess.Popen(
                self._line(program, **given), env=environment, stdout=log, stderr=log
            )

    def finish(self, program, **given):
        """Runs a program to its end."""
        code = self.start(program, **given).wait()
        assert code == 0, (self.place / f"{program}.log").read_text()[-4000:]

    def training(self, name):
        """What a training in a folder of this name is given."""
        packs = self._recipe != "prefix_tuning"  # which refuses packed rows
        return {
            "MODEL_DIR": self.place / name,
            "INITIAL_CHECKPOINT_PATH": self.folder / "dense" / "checkpoint_0",
            "TRAIN_FILE": self.folder / "train.jsonl",
            "TRAIN_STEPS": LAST,
            "BATCH_SIZE": 8,
            "DTYPE": "float32",
            "EVAL_STEPS": 1,
            "EVAL_PERIOD": PERIOD,
            "EVALUATOR_NUM_EXAMPLES": 4,
            "SaveCheckpointConfig.period": PERIOD,
            "train/utils.DatasetConfig.pack": packs,
            "train_eval/utils.DatasetConfig.pack": packs,
        }

    def killed(self, name):
        """A training that is killed behind its first checkpoint, and started again."""
        process = self.start("train", **self.training(name))
        while not (self.place / name / f"checkpoint_{PERIOD}").exists():
            assert process.poll() is None, (self.place / "train.log").read_text()[-4000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (self.place / name / f"checkpoint_{LAST}").exists()
        self.finish("train", **self.training(name))


def coda(program, files=(), **given):
    """A command of ours, in this process."""
    flags = [f"--gin_file={name}" for name in (f"runs/{program}.gin", *files)]
    cli.run([program, *flags, *(f"--gin.{name}={value}" for name, value in given.items())])
    gin.clear_config()


def converted(programs, checkpoint, trains_all):
    """What our commands are given to use a run's result, converted."""
    output = programs.place / "converted"
    if trains_all:
        coda("convert", INPUT=checkpoint, OUTPUT=output, LAYOUT="hf")
        return {"INITIAL_CHECKPOINT_PATH": output, "VOCABULARY": VOCABULARY}
    base = {"INITIAL_CHECKPOINT_PATH": bundled.DENSE}
    coda("convert", INPUT=checkpoint, OUTPUT=output, LAYOUT="adapter", **base)
    return {**base, "INITIAL_ADAPTER_PATH": output}


def read_lines(place, pattern):
    (file,) = place.glob(pattern)
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.all
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_trained_resumed_evaluated_inferred_and_converted(name, folder):
    programs = Programs(folder, name)
    programs.finish("train", **programs.training("undisturbed"))
    programs.killed("killed")
    base, expected, found = (
        trees.flatten(read_t5x(place)[0])
        for place in (folder / "dense", programs.place / "undisturbed", programs.place / "killed")
    )
    assert found.keys() == expected.keys()
    assert all(leaf.tobytes() == expected[path].tobytes() for path, leaf in found.items())
    config = read_record(run_folder(programs.place / "killed"))
    trained, frozen = map(trees.flatten, methods.partition(config, trees.unflatten(found)))
    base = {path: np.asarray(leaf, np.float32) for path, leaf in base.items()}  # as T5X has them
    assert all(leaf.tobytes() == base[path].tobytes() for path, leaf in frozen.items())
    assert all((leaf != base[path]).any() for path, leaf in trained.items() if path in base)

    checkpoint = programs.place / "killed" / f"checkpoint_{LAST}"
    served = {"CHECKPOINT_PATH": checkpoint, "SPLIT": "validation"}
    programs.finish("eval", **served, EVAL_OUTPUT_DIR=programs.place / "eval")
    programs.finish("infer", **served, INFER_OUTPUT_DIR=programs.place / "infer")
    metrics = read_lines(programs.place, "eval/inference_eval/*-metrics.jsonl")[-1]
    inferred = read_lines(programs.place, "infer/*.jsonl-00000-of-00001")
    answers = [line["prediction"].strip() for line in inferred]

    ours = converted(programs, checkpoint, not frozen)
    given = {"Decoding.max_decode_length": 32, "Decoding.max_input_length": 128}
    file, output = folder / "validation.jsonl", programs.place / "predicted.jsonl"
    coda("predict", **ours, **given, INPUT=file, OUTPUT=output)
    predicted = [json.loads(line)["prediction"].strip() for line in output.open()]
    assert answers == predicted
    output = programs.place / "evaluated.json"
    lengths = {"TASK_FEATURE_LENGTHS": {"inputs": 128, "targets": 32}}
    coda(
        "evaluate",
        ["tasks/jsonl.gin"],
        **ours,
        **given,
        **lengths,
        VALIDATION_FILE=file,
        OUTPUT=output,
    )
    (evaluated,) = json.loads(output.read_text()).values()
    metrics.pop("step")
    assert metrics == pytest.approx(evaluated)
    size = sum(leaf.size for leaf in trained.values())
    print(
        f"\n| {name} | {len(trained)} leaves, {size:,} values | {len(frozen)} of {len(frozen)} "
        f"| {len(found)} of {len(expected)} | {metrics} | {len(answers)} of {len(predicted)} |"
    )
