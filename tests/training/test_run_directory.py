"""What a run keeps on disk: a cut run ends like an uncut one, and a directory has one run."""

import dataclasses
import functools
import json
import os
from pathlib import Path
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_runs
from training_runs import Quick, make_batches

from coda_jax.data.cache import write_cache
from coda_jax.training import run_directory
from coda_jax.training.metrics_file import METRICS, read_metrics
from coda_jax.training.run_directory import Interruption, interruption, owned

run = functools.partial(training_runs.run, model=Quick)


@pytest.fixture(name="finished", scope="module")
def fixture_finished(tmp_path_factory):
    """A run of six steps."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, *run(directory)


# --- One run, one directory ---


def test_the_directory_tells_what_was_done(finished):
    directory, _, _, metrics = finished
    assert {"loss", "token_accuracy", "exact_match"} <= metrics.keys()
    described = json.loads((directory / "run.json").read_text())
    assert described["format_version"] == 3 and described["name"] == "test"
    assert described["learning_rate"] == {"name": "constant", "value": 0.01}
    assert list(directory.glob("events.out.tfevents*"))
    assert sorted(int(p.name) for p in (directory / "checkpoints").iterdir()) == [3, 6]


def test_a_finished_run_returns_the_same_again(finished):
    directory, _, after, metrics = finished
    _, again, again_metrics = run(directory)
    jax.tree.map(np.testing.assert_array_equal, after, again)
    assert metrics == again_metrics


def test_another_run_may_not_use_the_directory(finished):
    with pytest.raises(ValueError, match=r"other settings:\n  name: there 'test', here 'b'\n"):
        run(finished[0], run={"name": "b"})


def test_a_kill_while_a_checkpoint_is_replaced_lets_no_other_run_in(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    for step in (3, 6):
        (folder / ".replaced").mkdir(exist_ok=True)
        shutil.move(folder / "checkpoints" / str(step), folder / ".replaced")
    with pytest.raises(ValueError, match="other settings"):
        run(folder, run={"name": "b"})


def test_a_finished_run_is_evaluated_on_other_data_anew(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    other = {"run": {"name": "test", "eval_data": "b"}, "eval_batches": lambda: make_batches(1)}
    for _ in range(2):
        _, after, metrics = run(folder, **other)
        assert metrics["loss"] != finished[3]["loss"]
    jax.tree.map(np.testing.assert_array_equal, after, finished[2])
    assert run(folder, run={"name": "test"}, eval_batches=None)[2] == {}


@pytest.mark.parametrize("name", ["run[1]", "**"])
def test_names_that_orbax_takes_for_patterns_are_refused(name):
    with pytest.raises(ValueError, match="name another folder"):
        run_directory.checked(name)


def test_only_whole_numbers_are_steps(tmp_path):
    for name in ("6", "06", "6\N{SUPERSCRIPT TWO}", "x", "6.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert run_directory.saved_steps(tmp_path) == [6]


def test_a_first_step_that_fails_claims_nothing(tmp_path):
    class TooLarge(Quick):
        """Whose step needs more memory than there is."""

        def loss(self, params, batch, rng=None):
            raise MemoryError

    with pytest.raises(MemoryError):
        run(tmp_path, batches=make_batches(rows=8), model=TooLarge)
    run(tmp_path, batches=make_batches(rows=4), options=training_runs.OPTIONS)


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    another = pytest.raises(ValueError, match="another process is training in")
    with owned(tmp_path), another, owned(tmp_path):
        pass
    with owned(tmp_path):
        pass


def test_without_tensorboard_there_is_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with run_directory.metric_writer(tmp_path, 0) as write:
        write(1, {"loss": 2.0, "examples_per_second": 3.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert read_metrics(tmp_path) == {"loss": [(1, 2.0)]}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("coda_jax.processes.is_first", lambda: False)
    with run_directory.metric_writer(tmp_path, 0) as write:
        write(1, {"loss": 2.0})
    assert not list(tmp_path.iterdir())


# --- Runs that are cut off ---


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(name="heeded")
def fixture_heeded():
    """Signals that end a process; under nohup, or in the background, some are ignored."""
    previous = {signum: signal.signal(signum, signal.default_int_handler) for signum in SIGNALS}
    yield
    for signum, handler in previous.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(
    "signum", [SIGNALS[0], *(pytest.param(x, marks=pytest.mark.all) for x in SIGNALS[1:])]
)
@pytest.mark.usefixtures("heeded")
def test_a_run_that_is_asked_to_stop_ends_like_an_uncut_one(tmp_path, finished, signum, capsys):
    def batches():
        for number, batch in enumerate(make_batches(), start=1):
            if number == 2:
                os.kill(os.getpid(), signum)
            yield batch

    handlers = list(map(signal.getsignal, SIGNALS))
    sentence = f"stopped by {signum.name}: step 2 of 6 is saved"
    with pytest.raises(Interruption, match=sentence) as error:
        run(tmp_path, batches=batches())
    assert error.value.exit_code == 128 + signum
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert list(map(signal.getsignal, SIGNALS)) == handlers
    capsys.readouterr()
    _, after, _ = run(tmp_path)
    assert "continuing at step 2 of 6" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, after, finished[2])
    assert (tmp_path / METRICS).read_bytes() == (finished[0] / METRICS).read_bytes()


def test_an_evaluation_is_cut_off_and_made_up_for(tmp_path, finished, capsys):
    """So that a stop need not wait for its end; the run's metrics stay what they are."""
    evaluated = []

    def stopping():
        for number, batch in enumerate(make_batches(2)):
            yield batch
            evaluated.append(number)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interruption, match="step 3 of 6 is saved"):
        run(tmp_path, eval_batches=stopping)
    assert evaluated == [0]
    contents = tmp_path / "checkpoints" / "3" / "contents" / "metadata"
    assert json.loads(contents.read_text())["evaluation"] == {}
    _, after, metrics = run(tmp_path)
    assert json.loads(contents.read_text())["evaluation"].keys() == metrics.keys()
    jax.tree.map(np.testing.assert_array_equal, after, finished[2])
    assert metrics == finished[3]
    assert (tmp_path / METRICS).read_bytes() == (finished[0] / METRICS).read_bytes()
    assert not (tmp_path / ".replaced").exists()


def test_a_stop_before_a_step_was_taken_ends_at_once(tmp_path):
    def stopping(learning_rate):
        if learning_rate == 1e-2:  # the run's own, after the signals are watched
            os.kill(os.getpid(), signal.SIGTERM)
        return optax.adamw(learning_rate)

    with pytest.raises(Interruption, match="stopped by SIGTERM: before step 1 of 6"):
        run(tmp_path, optimizer=stopping)
    assert not (tmp_path / "run.json").exists()


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP is under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requests()
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize(
    ("module", "loaded", "command"),
    [
        ("pytest", True, "; this goes on: coda "),
        ("coda_jax.cli", True, "; this goes on: python -m coda_jax.cli "),
        ("my_script", False, ""),
    ],
)
def test_the_command_that_goes_on_is_told(monkeypatch, module, loaded, command):
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name=module))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setitem(sys.modules, "coda_jax.cli", main)
    if not loaded:
        monkeypatch.delitem(sys.modules, "coda_jax.cli")
    monkeypatch.setattr("sys.argv", ["/venv/bin/coda", "--gin.A='b c'"])
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "coda_jax.cli", "--gin.A='b c'"])
    requests = run_directory.Requests()
    requests.receive(signal.SIGTERM, None)
    with pytest.raises(Interruption) as error:
        requests.stop("step 1 is saved")
    quoted = command and command + shlex.quote("--gin.A='b c'")
    assert str(error.value) == f"stopped by SIGTERM: step 1 is saved{quoted}"


def test_a_ruined_run_is_an_error_and_keeps_the_last_good_checkpoint(tmp_path):
    """Invariant 6."""
    with pytest.raises(FloatingPointError, match="the loss of step 2 is"):
        run(tmp_path / "loss", learning_rate=1e30)
    options = dataclasses.replace(training_runs.OPTIONS, total_steps=2, save_every=1)

    def schedule(step):
        return jnp.where(step < 1, 1e-3, 1e30)  # the update of the second step ruins the run

    sentence = "the evaluation after step 2: .* holds .*; the last good checkpoint is of step 1"
    with pytest.raises(FloatingPointError, match=sentence):
        run(tmp_path / "evaluation", options=options, learning_rate=schedule)
    with pytest.raises(FloatingPointError, match=r"after step 2: trained/.* holds .*inf"):
        run(tmp_path / "leaves", options=options, learning_rate=schedule, eval_batches=None,
            optimizer=lambda learning_rate: optax.scale_by_learning_rate(
                lambda step: learning_rate(step) ** 2))  # fmt: skip
    for name in ("evaluation", "leaves"):
        assert [p.name for p in (tmp_path / name / "checkpoints").iterdir()] == ["1"]


@pytest.mark.usefixtures("heeded")
def test_a_second_ctrl_c_does_not_wait(capsys):
    handlers = list(map(signal.getsignal, SIGNALS))
    with pytest.raises(KeyboardInterrupt), interruption() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests() and "Ctrl-C again does not save" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # only noted
        os.kill(os.getpid(), signal.SIGINT)
    assert list(map(signal.getsignal, SIGNALS)) == handlers


def test_a_run_in_another_thread_takes_no_signals():
    seen = []

    def work():
        with interruption() as requests:
            seen.append(requests())

    handlers = list(map(signal.getsignal, SIGNALS))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False] and list(map(signal.getsignal, SIGNALS)) == handlers


# A run in a process of its own, on a host that has neither TensorFlow nor seqio.
SCRIPT = """
import pathlib
import sys
sys.path[:0] = {path!r}
for name in ("tensorflow", "seqio", "gin", "t5x"):
    sys.modules[name] = None
import numpy as np
import optax
from coda_jax import trees
from coda_jax.commands.loading import LoadedModel
from coda_jax.commands.train import train
from coda_jax.data.source import Data
from coda_jax.training.trainer import TrainOptions
from helpers import random_params
from training_runs import CONFIG
result, _ = train(
    sys.argv[1], LoadedModel(CONFIG, random_params(CONFIG), pathlib.Path(sys.argv[1])),
    data=Data({{"inputs": 8, "targets": 4}}, cache=sys.argv[2], batch_size=4),
    options=TrainOptions(60, save_every=5, log_every=5), optimizer=optax.adamw,
    learning_rate=1e-2)
np.savez(sys.argv[1] + "/result.npz", **trees.flatten(result.params))
"""


@pytest.fixture(name="cache", scope="module")
def fixture_cache(tmp_path_factory):
    """A cache file of random examples."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("cache") / "examples.npz"
    examples = (
        {"inputs": rng.integers(2, 20, 6), "targets": rng.integers(2, 20, 3)} for _ in range(30)
    )
    write_cache(path, examples, {"vocabulary": "bytes", "vocab_size": 20})
    return path


def start(directory, cache):
    """Starts the script; pytest itself is not importable there, so neither is seqio through it."""
    tests = Path(__file__).parents[1]
    script = SCRIPT.format(path=[str(tests), str(tests.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", script, str(directory), str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.all
def test_killed_runs_end_like_uncut_ones_without_tensorflow(tmp_path, cache):
    uncut, killed = tmp_path / "uncut", tmp_path / "killed"
    process = start(uncut, cache)
    output, _ = process.communicate()
    assert process.returncode == 0, output

    def kill_when(ready):
        process = start(killed, cache)
        while process.poll() is None and not ready():
            time.sleep(0.002)
        process.kill()
        process.communicate()

    checkpoints = killed / "checkpoints"
    # Once while the first checkpoint is being written, once after a later one is complete.
    kill_when(lambda: checkpoints.exists() and any(checkpoints.iterdir()))
    kill_when(lambda: any(int(p.name) >= 20 for p in checkpoints.iterdir() if p.name.isdigit()))
    process = start(killed, cache)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    with np.load(uncut / "result.npz") as a, np.load(killed / "result.npz") as b:
        assert set(a.files) == set(b.files)
        for path in a.files:
            np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    adapter = "export/adapter/adapter.safetensors"
    for name in (adapter, METRICS):
        assert (uncut / name).read_bytes() == (killed / name).read_bytes()
