"""What a run keeps on disk: a cut run ends like an uncut one, and a directory has one run."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from training_runs import make_batches, run

from coda_jax.data.cache import write_cache
from coda_jax.training import run_directory
from coda_jax.training.run_directory import Interruption, claim_directory


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
    assert described == {"format_version": 2, "name": "test"}
    assert list(directory.glob("events.out.tfevents*"))
    assert sorted(int(p.name) for p in (directory / "checkpoints").iterdir()) == [3, 6]


def test_a_finished_run_returns_the_same_again(finished):
    directory, _, after, metrics = finished
    _, again, again_metrics = run(directory)
    jax.tree.map(np.testing.assert_array_equal, after, again)
    assert metrics == again_metrics


def test_another_run_may_not_use_the_directory(finished):
    with pytest.raises(ValueError, match=r"holds another run(.|\n)*name: there 'test', here 'b'"):
        run(finished[0], run={"name": "b"})


def test_every_difference_of_a_run_is_listed(tmp_path):
    first = {"config": {"emb_dim": 8, "methods": [{"name": "coda"}]}, "seed": 0, "gone": 1}
    claim_directory(tmp_path, first)
    claim_directory(tmp_path, {**first, "seed": 0})  # the same
    second = {"config": {"emb_dim": 9, "methods": []}, "seed": 0, "new": (1, 2)}
    with pytest.raises(ValueError, match="another run") as error:
        claim_directory(tmp_path, second)
    assert str(error.value).splitlines()[1:] == [
        "  config/emb_dim: there 8, here 9",
        "  config/methods: there [{'name': 'coda'}], here []",
        "  gone: there 1, here None",
        "  new: there None, here [1, 2]",
    ]
    assert json.loads((tmp_path / "run.json").read_text()) == {"format_version": 2, **first}


@pytest.mark.parametrize(("version", "found"), [({}, "1"), ({"format_version": 3}, "3")])
def test_a_run_of_another_version_is_not_continued(tmp_path, version, found):
    (tmp_path / "run.json").write_text(json.dumps({**version, "name": "test"}))
    sentence = (
        f"holds a run of format_version={found}, which this version .2. cannot continue: "
        "`coda convert` turns it into a checkpoint or an adapter"
    )
    with pytest.raises(ValueError, match=sentence):
        claim_directory(tmp_path, {"name": "test"})
    assert json.loads((tmp_path / "run.json").read_text()) == {**version, "name": "test"}


def test_a_damaged_description_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"format_version": 2, "na')
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON"):
        claim_directory(tmp_path, {"name": "test"})


def test_metrics_are_dropped_where_there_is_no_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with run_directory.metric_writer(tmp_path) as write:
        write(1, {"loss": 2.0})
    assert not list(tmp_path.iterdir())


# --- Runs that are cut off ---


def test_a_run_cut_by_sigterm_ends_like_an_uncut_one(tmp_path, finished):
    def batches():
        for number, batch in enumerate(make_batches(), start=1):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interruption, match="after step 2"):
        run(tmp_path, batches=batches())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert signal.getsignal(signal.SIGTERM) == handler
    _, after, _ = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, after, finished[2])


# A run in a process of its own, on a host that has neither TensorFlow nor seqio.
SCRIPT = """
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
    sys.argv[1], LoadedModel(CONFIG, random_params(CONFIG), None),
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
    assert (uncut / adapter).read_bytes() == (killed / adapter).read_bytes()
