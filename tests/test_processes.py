"""Two processes as one run: what they train and answer, write and say, and how they end."""

import json
import re
import signal
import time

from command_line import letters_task
import divided_runs
from helpers import config, random_params
import jax
import joined
import joined_runs
import numpy as np
import pytest

from coda_jax import checkpoints, processes

CASES = ("t5-coda", "t5-parallel_adapter", "t5-full", "wav2vec2-bert-lora")
CLI = ("-m", "coda_jax.cli")


def alone(*arguments):
    """Runs Python with these arguments in one process of one device."""
    ((status, _, errors),) = joined.finished(joined.start([arguments], devices=1))
    assert status == 0, errors


def results(folder, how):
    """(the parameters, what else is reported) of `joined_runs`."""
    with np.load(folder / how / "params.npz") as stored:
        params = dict(stored)
    return params, json.loads((folder / how / "report.json").read_text())


def test_a_state_of_two_processes_is_gathered_saved_and_restored(tmp_path):
    """Of one device each; and what one of them has alone is refused."""
    joined.run(joined_runs.__file__, "state", tmp_path, "joined", devices=1)
    assert sorted(path.name for path in (tmp_path / "joined").iterdir()) == [
        "checkpoints",
        "run.json",
    ]


@pytest.mark.all
@pytest.mark.parametrize("case", CASES)
def test_two_processes_of_four_devices_train_and_answer_as_one_device(case, tmp_path):
    """As data 4 x model 2; four steps of Adam with dropout, in two parts."""
    alone(joined_runs.__file__, case, tmp_path, "one")  # compiled by the same flags
    joined.run(joined_runs.__file__, case, tmp_path, "joined")
    (params, report), (expected, other) = results(tmp_path, "joined"), results(tmp_path, "one")
    assert report["resumed"], "a run that was cut off ends with other bits"
    assert divided_runs.largest(params, expected) < 1e-5
    assert divided_runs.largest(report["metrics"], other["metrics"]) < 1e-5
    tokens, *numbers = report["answers"]
    assert tokens == other["answers"][0]
    assert divided_runs.largest(numbers, other["answers"][1:]) < 1e-5
    run = json.loads((tmp_path / "joined" / "cut" / "run.json").read_text())
    assert run["machine"] == {
        "devices": 8,
        "platform": "cpu",
        "mesh": divided_runs.MESH,
        "processes": 2,
    }


@pytest.mark.all
def test_a_device_of_two_processes_holds_its_share(tmp_path):
    """By the compiler's own count of a step's arguments."""
    printed = joined.run(joined_runs.__file__, "memory", tmp_path, "joined")
    whole, halves, quarters = json.loads(printed.splitlines()[-1])
    assert halves["frozen"] < 0.51 * whole["frozen"]
    assert quarters["frozen"] < 0.26 * whole["frozen"]
    assert whole["temporary"] > halves["temporary"] > quarters["temporary"]
    for row in (whole, halves, quarters):
        assert row["arguments"] == row["held"]


def test_one_process_needs_no_other(tmp_path):
    """Values are its own, and nothing is waited for."""
    assert not processes.are_several() and processes.is_first()
    assert processes.from_first(lambda: {"a": 1}) == {"a": 1}
    processes.check_same("what is not read", lambda: 1 / 0)
    with processes.ending_together(str, len):
        tree = processes.fetch({"a": np.arange(3)})
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("2", r"an address is missing\): set JAX_COORDINATOR_ADDRESS=HOST:PORT of the first"),
        ("two", r"'two'\): set .* JAX_NUM_PROCESSES, and JAX_PROCESS_ID from 0"),
    ],
)
def test_a_process_that_does_not_know_the_others_says_what_is_missing(number, said, monkeypatch):
    def initialize(num_processes, process_id):
        assert (num_processes, process_id) == (2, None)
        raise ValueError("an address is missing")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("JAX_NUM_PROCESSES", number)
    with pytest.raises(ValueError, match=f"DISTRIBUTED=True, but .*{said}"):
        processes.placement(distributed=True)


# --- Commands ---


@pytest.fixture(name="shared", scope="module")
def fixture_shared(tmp_path_factory):
    """A tiny checkpoint of bytes and a task of words, as arguments."""
    folder = tmp_path_factory.mktemp("shared")
    cfg = config(vocab_size=384, num_encoder_layers=1)
    checkpoints.save_hf(folder / "base", cfg, random_params(cfg))
    files = letters_task(folder, 32, 11)
    return {
        **files,
        "INITIAL_CHECKPOINT_PATH": folder / "base",
        "VOCABULARY": "bytes",
        "BATCH_SIZE": 8,
    }


def arguments(command, files, **bindings):
    """Of Python, for a command."""
    files = [f"--gin_file={file}" for file in files]
    return [*CLI, command, *files, *(f"--gin.{name}={x}" for name, x in bindings.items())]


def training(shared, directory, **bindings):
    """The arguments of a training run."""
    files = ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]
    short = {"TRAIN_STEPS": 6, "TrainOptions.save_every": 3, "ParallelAdapter.bottleneck": 4}
    lengths = {"TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4}}
    return arguments(
        "train", files, MODEL_DIR=directory, **{**shared, **lengths, **short, **bindings}
    )


JOINED = {"DISTRIBUTED": True, "MESH": {"data": 4, "model": 2}}


@pytest.mark.all
def test_commands_of_two_processes_give_what_one_gives(shared, tmp_path):
    """Adapters, metrics and answers, each in one file."""
    found = {}
    for how, given in (("one", {}), ("two", JOINED)):
        folder = tmp_path / how
        run = joined.run if given else alone
        run(*training(shared, folder / "run", **given))
        trained = {"INITIAL_ADAPTER_PATH": folder / "run" / "export" / "adapter"} | given
        task = arguments(
            "evaluate",
            ["runs/evaluate.gin", "tasks/jsonl.gin"],
            OUTPUT=folder / "metrics.json",
            **shared,
            **trained,
        )
        run(*task)
        model = {
            name: shared[name] for name in ("INITIAL_CHECKPOINT_PATH", "VOCABULARY", "BATCH_SIZE")
        }
        inputs = {"INPUT": shared["VALIDATION_FILE"], "OUTPUT": folder / "answers.jsonl"}
        run(*arguments("predict", ["runs/predict.gin"], SCORES=True, **model, **inputs, **trained))
        found[how] = folder
    one, two = found["one"], found["two"]
    assert (one / "metrics.json").read_text() == (two / "metrics.json").read_text()
    lines = [
        [json.loads(x) for x in (f / "answers.jsonl").read_text().splitlines()] for f in (one, two)
    ]
    assert len(lines[1]) == 11
    for line, other in zip(*lines, strict=True):
        scores = [x.pop("score") for x in (line, other)]
        assert line == other and scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.all
def test_a_mesh_of_other_sizes_is_refused_with_the_numbers(shared, tmp_path):
    command = training(shared, tmp_path, DISTRIBUTED=True, MESH={"data": 2, "model": 2})
    said = "coda train: MESH must be of all 8 devices of 2 processes, got 2 x 2 = 4"
    found = joined.finished(joined.start([command] * 2))
    assert {status for status, *_ in found} == {1}
    assert all(said in errors or "failed: MESH must be" in errors for *_, errors in found)
    assert any(said in errors for *_, errors in found)


@pytest.mark.all
@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_fails_all_end_with_its_message(failing, shared, tmp_path):
    """One of them has no such file."""
    commands = [training(shared, tmp_path, **JOINED)] * 2
    commands[failing] = training({**shared, "TRAIN_FILE": "missing.jsonl"}, tmp_path, **JOINED)
    found = joined.finished(joined.start(commands), timeout=90)
    assert [status for status, *_ in found] == [1, 1]
    assert "coda train: " in found[failing][2] and "missing.jsonl" in found[failing][2]
    assert f"process {failing} of 2 failed: " in found[1 - failing][2]
    assert "missing.jsonl" in found[1 - failing][2]


@pytest.mark.all
def test_a_run_folder_that_is_not_shared_is_refused(shared, tmp_path):
    """As on hosts with disks of their own."""
    commands = [training(shared, tmp_path / str(host), **JOINED) for host in (0, 1)]
    found = joined.finished(joined.start(commands), timeout=90)
    assert [status for status, *_ in found] == [1, 1]
    assert "1 is another folder here than where process 0 runs: name one in a file" in found[1][2]
    assert "process 1 of 2 failed: MODEL_DIR=" in found[0][2]


@pytest.mark.all
def test_processes_with_other_settings_are_refused(shared, tmp_path):
    commands = [training(shared, tmp_path, SEED=seed, **JOINED) for seed in (0, 1)]
    found = joined.finished(joined.start(commands), timeout=90)
    assert [status for status, *_ in found] == [1, 1]
    assert "of process 1 are not those of process 0" in found[1][2] or "another run" in found[1][2]
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.fixture(name="interruptible")
def fixture_interruptible():
    """SIGINT is heeded; a background job of a shell, as these tests may be, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.all
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("told", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_saves_and_stops_all(told, signum, shared, tmp_path):
    """And the same command goes on from there."""
    given = JOINED | {"TRAIN_STEPS": 100_000, "TrainOptions.save_every": 2}
    command = training(shared, tmp_path, **given)
    started = joined.start([command] * 2)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "2").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started[told].send_signal(signum)
    found = joined.finished(started, timeout=90)
    assert [status for status, *_ in found] == (
        [143, 143] if signum == signal.SIGTERM else [143 - 13 * (n == told) for n in (0, 1)]
    )
    steps = {re.search(r"step (\d+) of 100000 is saved", errors)[1] for *_, errors in found}
    (step,) = steps
    assert (tmp_path / "checkpoints" / step).exists()
    again = joined.start([command] * 2)
    while (line := again[0].stdout.readline()) and "continuing" not in line:
        pass
    # What the processes' own library prints can follow on the same line.
    assert line.startswith(f"continuing at step {step} of 100000")
    again[0].terminate()
    assert [status for status, *_ in joined.finished(again, timeout=90)] == [143, 143]
