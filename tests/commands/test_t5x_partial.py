"""Checkpoints of what was trained alone: saved, and whole again with their base; without T5X."""

import shutil

from helpers import ADAPTER, adapted_params, assert_same_tree, config, random_params
import jax
import ml_dtypes
import numpy as np
import pytest

from coda_jax import checkpoints, files, trees
from coda_jax.checkpoints.t5x import read_t5x, t5x_shapes
from coda_jax.checkpoints.t5x_partial import is_partial
from coda_jax.checkpoints.t5x_record import RECORD, run_folder, write_record
from coda_jax.commands import t5x_run
from coda_jax.commands.check import check_leaves
from coda_jax.commands.convert import convert
from coda_jax.commands.t5x_partial import noted_base, saved, whole
from coda_jax.methods import Coda, Full, partition

CONFIG = config(relpos_num_buckets=32, relpos_max_distance=128)
CONFIG = CONFIG.replace(methods=(Coda(3), ADAPTER))
INFOS = jax.tree.map(lambda leaf: f"of {leaf.shape}", random_params(CONFIG))


def numpy(params):
    return jax.tree.map(np.asarray, params)


@pytest.fixture(name="run", scope="module", params=[np.float32, ml_dtypes.bfloat16, "scanned"])
def fixture_run(request, tmp_path_factory):
    """(base, folder of a run from it, with a checkpoint of what it trained, its leaves)."""
    tmp_path = tmp_path_factory.mktemp("partial")
    base, folder = tmp_path / "base", str(tmp_path / "run")
    dtype = np.float32 if request.param == "scanned" else request.param
    dense = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), random_params(CONFIG.dense()))
    checkpoints.save_hf(tmp_path / "hf", CONFIG.dense(), dense)
    convert(str(tmp_path / "hf"), str(base), "t5x", scan_layers=request.param == "scanned")
    base = str(base / "checkpoint_0")
    given = CONFIG, base, folder
    write_record(run_folder(folder), CONFIG, noted_base(*given, trained_only=True))
    params = adapted_params(CONFIG, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dense))
    state = {"target": params, "state": {"step": 7}}
    kept, infos = saved(*given, trained_only=True)(state, {"target": INFOS, "state": {"step": 0}})
    trained = trees.flatten(partition(CONFIG, params)[0])
    assert trees.flatten(kept["target"]).keys() == trained.keys()
    assert trees.flatten(infos["target"]).keys() == trained.keys()
    assert kept["state"] == {"step": 7} and infos["state"] == {"step": 0}
    checkpoints.save_t5x(folder, kept["target"], 7)
    return base, folder, params


def restored(config, folder, base, resuming, params):
    """What T5X gets for the newest checkpoint of a run."""
    path = base if resuming else f"{folder}/checkpoint_7"
    state = {"target": read_t5x(folder)[0], "state": {"step": 7}}
    for step in (
        whole(config, path, base, folder if resuming else None),
        t5x_run.restoration(config, path),
    ):
        state = step(state, {"target": params}, is_resuming=resuming)
    return state["target"]


@pytest.mark.parametrize("resuming", [True, False])
def test_a_run_goes_on_and_is_evaluated_with_its_base(run, resuming):
    base, folder, params = run
    assert is_partial(CONFIG, trees.flatten(t5x_shapes(folder)))
    assert check_leaves(CONFIG, folder) == "restored"
    assert_same_tree(restored(CONFIG, folder, base, resuming, params), params)


@pytest.mark.parametrize("resuming", [True, False])
def test_another_base_or_none_is_refused_in_two_lines(run, resuming, tmp_path):
    base, folder, params = run
    other = str(checkpoints.save_t5x(tmp_path / "other", numpy(random_params(CONFIG.dense(), 1))))
    text = rf"was not trained from {other}: \d+ of \d+ frozen leaves differ, such as decoder/"
    with pytest.raises(ValueError, match=text):
        restored(CONFIG, folder, other, resuming, params)
    if not resuming:
        with pytest.raises(ValueError, match=r"only what was trained: give the base that it"):
            restored(CONFIG, folder, None, resuming, params)
    folder = str(shutil.copytree(folder, tmp_path / "run"))
    (run_folder(folder) / RECORD).unlink()
    with pytest.raises(ValueError, match=r"model.json of its run, which says of which base, is no"):
        restored(CONFIG, folder, base, resuming, params)


def test_it_is_converted_with_its_base(run, tmp_path):
    base, folder, params = run
    convert(folder, str(tmp_path / "adapter"), "adapter", base=base)
    dense = read_t5x(base)[0]
    loaded = checkpoints.load_adapter(tmp_path / "adapter", CONFIG.dense(), dense)
    assert loaded[0] == CONFIG
    trained = partition(CONFIG, params)[0]
    assert_same_tree(loaded[1], trees.merge(trained, partition(CONFIG, dense)[1]))
    convert(folder, str(tmp_path / "t5x"), "t5x", base=base)
    assert_same_tree(checkpoints.load_t5x(tmp_path / "t5x", CONFIG), loaded[1])
    with pytest.raises(ValueError, match="only what was trained: give the base that it belongs to"):
        convert(folder, str(tmp_path / "x"), "adapter")
    other = checkpoints.save_t5x(tmp_path / "other", numpy(random_params(CONFIG.dense(), 1)))
    with pytest.raises(ValueError, match=r"was not trained from .*other/checkpoint_0: \d+ of \d+"):
        convert(folder, str(tmp_path / "x"), "adapter", base=str(other))


def test_a_training_does_not_start_from_it(run):
    _, folder, _ = run
    path = f"{folder}/checkpoint_7"
    with pytest.raises(ValueError, match="a training starts from all leaves, which `coda convert`"):
        whole(CONFIG, path, path, f"{folder}/other")


def test_who_does_not_ask_saves_everything(tmp_path):
    state = {"target": {"x": 1}}
    given = CONFIG, "base", str(tmp_path)
    assert saved(*given)(state, INFOS) == (state, INFOS)
    assert noted_base(*given) is None


@pytest.mark.parametrize(
    ("changes", "base", "text"),
    [
        ({"methods": (Full(),)}, "base", "has no effect: METHODS train all parameters"),
        ({}, "gs://bucket/checkpoint_9", "copy INITIAL_CHECKPOINT_PATH=gs://bucket/checkpoint_9"),
    ],
)
def test_where_nothing_would_be_left_out_or_read_again_it_is_refused(tmp_path, changes, base, text):
    with pytest.raises(ValueError, match=text):
        saved(CONFIG.replace(**changes), base, str(tmp_path), trained_only=True)


def test_a_run_that_saved_everything_does_not_change_its_mind(run, tmp_path):
    """What it started from might be another base than the one that is given now."""
    base, folder, _ = run
    saved(CONFIG, base, folder, trained_only=True)
    whole = shutil.copytree(folder, tmp_path / "whole")
    record = files.read_json(whole / RECORD)
    files.write_json(whole / RECORD, {k: x for k, x in record.items() if k != "base"})
    with pytest.raises(ValueError, match=r"for a run from its start, and .*whole has checkpoints"):
        saved(CONFIG, base, str(whole), trained_only=True)


def test_a_record_keeps_the_base_that_it_has(run):
    base, folder, _ = run
    expected = noted_base(CONFIG, base, folder + "_new", trained_only=True)
    assert noted_base(CONFIG, "another", folder, trained_only=False) == expected
