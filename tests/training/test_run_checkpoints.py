"""Checkpoints of a run: what is read is what was saved, or the one before it, never a ruin."""

import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.checkpoints.adapter import leaf_sha256
from coda_jax.training.run_checkpoints import RunCheckpoints, check_finite, recover
from coda_jax.training.run_directory import saved_steps
from coda_jax.training.steps import TrainState

RUN = {"format_version": 3, "name": "test"}


def state_of(step, **changes):
    """A state that differs from step to step."""
    values = np.random.default_rng(step).normal(size=(2, 3)).astype(np.float32)
    trained = {"encoder": {"kernel": jnp.asarray(values), "scale": jnp.ones(3) * step}}
    optimizer = ({"mu": jnp.asarray(values * 2), "count": jnp.int32(step)}, ())
    return TrainState(jnp.int32(step), **{"trained": trained, "optimizer": optimizer} | changes)


EMPTY = jax.tree.map(jnp.zeros_like, state_of(1))


def same(first, second):
    """Whether two states have the same bits."""
    return jax.tree.map(leaf_sha256, first) == jax.tree.map(leaf_sha256, second)


def save(folder, metrics, **options):
    """Saves {step: metrics}."""
    with RunCheckpoints(folder, RUN, **{"keep": 3} | options) as checkpoints:
        for step, found in metrics.items():
            checkpoints.save(state_of(step), found, {"at": step})


@pytest.fixture(name="saved", scope="module")
def fixture_saved(tmp_path_factory):
    """A folder with the checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, {3: {"loss": 2.0}, 6: {"loss": 1.0}})
    return folder


@pytest.fixture(name="copy")
def fixture_copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


# --- What is kept ---


def test_the_newest_is_restored_with_its_metrics(saved):
    with RunCheckpoints(saved, RUN, 3) as checkpoints:
        state, metrics, carried = checkpoints.restore(EMPTY)
    assert same(state, state_of(6)) and metrics == {"loss": 1.0} and carried == {"at": 6}
    assert json.loads((saved / "run.json").read_text()) == RUN


def test_without_a_checkpoint_the_state_stays_and_nothing_is_claimed(tmp_path):
    with RunCheckpoints(tmp_path, RUN, 3) as checkpoints:
        assert checkpoints.restore(EMPTY) == (EMPTY, {}, {})
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "kept", "best"),
    [
        ({"keep": 2}, [3, 4], 4),
        ({"keep": 1, "best_metric": "loss", "best_mode": "min"}, [2, 4], 2),
        ({"keep": 1, "best_metric": "loss", "best_mode": "max"}, [1, 4], 1),
        ({"keep": 2, "best_metric": "loss", "best_mode": "min"}, [2, 3, 4], 2),
    ],
)
def test_the_best_are_kept_and_the_newest(tmp_path, options, kept, best):
    save(tmp_path, {1: {"loss": 3.0}, 2: {"loss": 1.0}, 3: {"loss": 1.5}, 4: {}}, **options)
    assert saved_steps(tmp_path) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "run.json"]
    with RunCheckpoints(tmp_path, RUN, **options) as checkpoints:
        assert int(checkpoints.best(EMPTY)[0].step) == best
        assert int(checkpoints.restore(EMPTY)[0].step) == 4


# --- Damage ---


def flip(folder, rng, step=6):
    """Flips one bit in one file of a checkpoint; returns the file."""
    files = sorted((folder / "checkpoints" / str(step)).rglob("*"))
    file = rng.choice([path for path in files if path.is_file() and path.stat().st_size])
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    return file


def check_flip(folder, capsys):
    """What is read is what was saved: the newest, or, where that is named, the one before."""
    with RunCheckpoints(folder, RUN, 3) as checkpoints:
        state, metrics, _ = checkpoints.restore(EMPTY)
    said, step = capsys.readouterr().out, int(state.step)
    assert same(state, state_of(step)) and metrics == {3: {"loss": 2.0}, 6: {"loss": 1.0}}[step]
    assert (step == 3) == ("the checkpoint of step 6 is damaged" in said)
    return step


def test_flipped_bits_are_named_or_change_nothing(saved, tmp_path, capsys):
    rng = random.Random(0)
    found = set()
    for number in range(12):
        folder = shutil.copytree(saved, tmp_path / str(number))
        flip(folder, rng)
        found.add(check_flip(folder, capsys))
    assert found == {3, 6}


@pytest.mark.all
def test_many_flipped_bits_are_named_or_change_nothing(saved, tmp_path, capsys):
    rng = random.Random(1)
    for _ in range(400):
        folder = shutil.copytree(saved, tmp_path / "flipped")
        flip(folder, rng)
        check_flip(folder, capsys)
        shutil.rmtree(folder)


def contents_of(folder, step):
    return folder / "checkpoints" / str(step) / "contents" / "metadata"


def edit(folder, step, change):
    """Edits what a checkpoint says that it holds."""
    contents = json.loads(contents_of(folder, step).read_text())
    change(contents)
    contents_of(folder, step).write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: edit(c, 6, lambda x: x["evaluation"].update(loss=0.1)), "not what was saved"),
        (lambda c: edit(c, 6, lambda x: x.update(step=7)), "not what was saved"),
        (lambda c: edit(c, 6, lambda x: x.pop("sha256")), "contents cannot be read"),
        (lambda c: contents_of(c, 6).write_text("[]"), "contents cannot be read"),
        (lambda c: contents_of(c, 6).unlink(), "contents cannot be read"),
        (lambda c: shutil.rmtree(c / "checkpoints" / "6" / "state"), "cannot be read"),
        (  # the leaves of another step under this name
            lambda c: (
                shutil.rmtree(c / "checkpoints" / "6" / "state"),
                shutil.copytree(c / "checkpoints/3/state", c / "checkpoints/6/state"),
            ),
            "the leaf step and 4 more is not what was saved",
        ),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(
    copy, capsys, damage, reason
):
    damage(copy)
    with RunCheckpoints(copy, RUN, 3) as checkpoints:
        state, metrics, _ = checkpoints.restore(EMPTY)
        said = capsys.readouterr().out
        assert reason in said and "that of step 3 is taken" in said and said.count("\n") == 1
        assert same(state, state_of(3)) and metrics == {"loss": 2.0}
        assert [path.name for path in (copy / "damaged").iterdir()] == ["6"]
        checkpoints.save(state_of(6), {"loss": 1.0}, {})
    assert saved_steps(copy) == [3, 6]


def test_the_best_is_not_chosen_by_a_metric_that_was_changed(copy, capsys):
    edit(copy, 3, lambda x: x["evaluation"].update(loss=0.1))
    with RunCheckpoints(copy, RUN, 3, "loss", "min") as checkpoints:
        state, metrics, _ = checkpoints.best(EMPTY)
    assert "the checkpoint of step 3 is damaged" in capsys.readouterr().out
    assert same(state, state_of(6)) and metrics == {"loss": 1.0}


def test_a_damaged_checkpoint_takes_no_place_among_those_that_are_kept(tmp_path):
    options = {"keep": 1, "best_metric": "loss", "best_mode": "min"}
    save(tmp_path, {1: {"loss": 3.0}}, **options)
    contents_of(tmp_path, 1).write_text("{}")
    save(tmp_path, {2: {"loss": 1.0}, 3: {"loss": 2.0}}, **options)
    assert saved_steps(tmp_path) == [1, 2, 3]
    with RunCheckpoints(tmp_path, RUN, **options) as checkpoints:
        assert int(checkpoints.best(EMPTY)[0].step) == 2


def test_where_no_checkpoint_is_sound_all_are_named_and_stay(copy):
    for step in (3, 6):
        contents_of(copy, step).unlink()
    named = pytest.raises(ValueError, match=r"are damaged; .*\n  step 6: .*\n  step 3: ")
    with RunCheckpoints(copy, RUN, 3) as checkpoints, named:
        checkpoints.restore(EMPTY)
    assert saved_steps(copy) == [3, 6]


# --- Ruin ---


@pytest.mark.parametrize(
    ("changes", "metrics", "name"),
    [
        (
            {"trained": {"encoder": {"scale": jnp.array([1.0, jnp.nan])}}},
            {},
            "trained/encoder/scale holds nan",
        ),
        ({"optimizer": {"nu": jnp.array([jnp.inf], jnp.bfloat16)}}, {}, "optimizer/nu holds inf"),
        ({"optimizer": {"best": jnp.float32(jnp.nan)}}, {}, "optimizer/best holds nan"),
        ({}, {"accuracy": 0.5, "loss": float("inf")}, "loss holds inf"),
    ],
)
def test_what_is_not_finite_is_never_saved(copy, changes, metrics, name):
    refused = pytest.raises(FloatingPointError, match=f"after step 7.*: .*{name}")
    with RunCheckpoints(copy, RUN, 1) as checkpoints, refused as error:
        checkpoints.save(state_of(7, **changes), metrics, {})
    assert "the last good checkpoint is of step 6" in str(error.value)
    assert saved_steps(copy) == [6]  # keep=1; nothing else was removed


def test_a_scalar_of_an_optimizer_may_be_infinite():
    check_finite({"optimizer/best_value": np.float32(np.inf), "trained/ids": np.arange(3)}, "x")


# --- Kills ---


SCRIPT = """
import os, signal, sys
sys.path[:0] = {path!r}
from test_run_checkpoints import RUN, state_of
from coda_jax.training import run_checkpoints as module
count = 0
def hooked(name, function):
    def call(*arguments, **keywords):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call
for owner, name in ((os, "replace"), (os, "rename"), (module.shutil, "rmtree")):
    setattr(owner, name, hooked(name, getattr(owner, name)))
with module.RunCheckpoints(__import__("pathlib").Path(sys.argv[1]), RUN, 2) as checkpoints:
    checkpoints.save(state_of(6), {{}}, {{}})
    checkpoints.replace(state_of(6), {{"loss": 1.0}}, {{}})
    checkpoints.save(state_of(9), {{"loss": 0.5}}, {{}})
"""


@pytest.mark.all
def test_a_kill_at_any_rename_or_removal_leaves_whole_checkpoints(tmp_path):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.getcwd()]
    script = SCRIPT.format(path=paths)
    before = tmp_path / "before"
    save(before, {1: {"loss": 3.0}, 3: {"loss": 2.0}})
    for number in range(1, 40):
        folder = shutil.copytree(before, tmp_path / str(number))
        command = [sys.executable, "-c", script, str(folder), str(number)]
        code = subprocess.run(command, stderr=subprocess.DEVNULL).returncode
        recover(folder)
        with RunCheckpoints(folder, RUN, 2) as checkpoints:
            state, metrics, _ = checkpoints.restore(EMPTY)
        step = int(state.step)
        assert same(state, state_of(step))
        assert metrics in ({3: [{"loss": 2.0}], 6: [{}, {"loss": 1.0}], 9: [{"loss": 0.5}]}[step])
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "run.json"]
        assert {path.name for path in (folder / "checkpoints").iterdir()} <= {*"1369"}
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and number > 5


def test_a_replacement_that_was_cut_off_is_undone_or_done(copy):
    (copy / ".replaced").mkdir()
    shutil.move(copy / "checkpoints" / "6", copy / ".replaced")
    shutil.copytree(copy / "checkpoints" / "3", copy / ".replaced" / "3")
    torn = copy / "checkpoints" / "9.orbax-checkpoint-tmp-0"
    torn.mkdir()
    recover(copy)
    with RunCheckpoints(copy, RUN, 3) as checkpoints:
        assert same(checkpoints.restore(EMPTY)[0], state_of(6))
        checkpoints.replace(state_of(6), {"loss": 0.5}, {})
        assert checkpoints.restore(EMPTY)[1] == {"loss": 0.5}
    assert sorted(path.name for path in copy.iterdir()) == ["checkpoints", "run.json"]
    assert [path.name for path in sorted((copy / "checkpoints").iterdir())] == ["3", "6"]
