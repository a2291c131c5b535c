"""What makes a run: all that decides its result, and an error that lists what differs."""

import dataclasses
import functools
import json

from helpers import random_params
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import CONFIG, OPTIONS, make_batches

from coda_jax import trees
from coda_jax.objectives import Seq2Seq
from coda_jax.sharding import Placement
from coda_jax.training import run_identity
from coda_jax.training.run_identity import check_run, differences, identify, run_file
from coda_jax.training.schedules import warmup_cosine

PARAMS = random_params(CONFIG)


def run_of(**changes):
    """The identity of a run with other arguments."""
    given = {
        "model": Seq2Seq(CONFIG),
        "params": PARAMS,
        "options": OPTIONS,
        "optimizer": optax.adamw,
        "learning_rate": 1e-2,
        "first_batch": next(make_batches()),
        "data": {"sha256": "0"},
        "placement": Placement(),
    } | changes
    data, given_placement = given.pop("data"), given.pop("placement")
    return run_file({**identify(**given), "data": data}, given_placement)


def options(**changes):
    return {"options": dataclasses.replace(OPTIONS, **changes)}


def changed(path, change):
    """The parameters with one leaf changed."""
    flat = trees.flatten(PARAMS)
    return {"params": trees.unflatten({**flat, path: change(np.asarray(flat[path]))})}


def methods(**changes):
    first, *others = CONFIG.methods
    config = CONFIG.replace(methods=(dataclasses.replace(first, **changes), *others))
    return {"model": Seq2Seq(config)}


ADAPTER = "encoder/layers_0/adapter/wi/kernel"


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ({}, {"learning_rate": 1e-3}, ["learning_rate/value: there 0.01, here 0.001"]),
        (
            {},
            {"learning_rate": optax.constant_schedule(1e-2)},
            ["learning_rate/name: there 'constant', here 'constant_schedule'"],
        ),
        (
            {"learning_rate": warmup_cosine(3e-3, 60)},
            {"learning_rate": warmup_cosine(1e-3, 60)},
            [
                "learning_rate/cosine_decay_schedule/init_value: there 0.003, here 0.001",
                "learning_rate/polynomial_schedule/end_value: there 0.003, here 0.001",
            ],
        ),
        (  # what no closure tells
            {"learning_rate": lambda step: 1e-2},
            {"learning_rate": lambda step: jnp.where(step != 3, 1e-2, 1e-3)},
            ["the learning rates at some steps: 1 of 6 differ, 3"],
        ),
        (  # a schedule of the run's length
            {"learning_rate": warmup_cosine(1e-3, 6)},
            {"learning_rate": warmup_cosine(1e-3, 12), **options(total_steps=12)},
            ["options/total_steps: there 6, here 12"],
        ),
        ({}, {"optimizer": optax.sgd}, ["optimizer/name: there 'adamw', here 'sgd'"]),
        (
            {},
            {"optimizer": functools.partial(optax.adamw, b1=0.8)},
            ["optimizer/scale_by_adam/b1: there 0.9, here 0.8"],
        ),
        (
            {"optimizer": lambda learning_rate: optax.sgd(learning_rate)},
            {"optimizer": lambda learning_rate: optax.sgd(lambda s: 2 * learning_rate(s))},
            ["the updates of a small example: 12 of 12 differ, 0 ..."],
        ),
        ({}, options(total_steps=3), ["options/total_steps: there 6, here 3"]),
        ({}, options(max_grad_norm=None), ["options/max_grad_norm: there 1.0, here None"]),
        ({}, options(accumulation=2), ["options/accumulation: there 1, here 2"]),
        ({}, options(best_metric="loss"), ["options/best_metric: there None, here 'loss'"]),
        (  # the seed explains other data and other leaves at the start
            {},
            {**options(seed=1), "first_batch": [*make_batches(2)][1]},
            ["options/seed: there 0, here 1"],
        ),
        (
            {},
            {"data": {"sha256": "1"}},
            ["data/sha256: the examples are not those that the run began with"],
        ),
        (
            {},
            {"first_batch": [*make_batches(2)][1]},
            ["the arrays of the first batch: 4 of 4 differ, decoder_input_tokens ..."],
        ),
        ({}, methods(reduction=3.0), ["config/methods/coda/reduction: there 2.0, here 3.0"]),
        (
            {},
            {"model": Seq2Seq(CONFIG.replace(methods=CONFIG.methods[1:]))},
            [
                "config/methods/coda: there {'reduction': 2.0, 'epsilon': 1.0, 'solver': 'exact', "
                "'num_i..., here None",
                "the base's leaves: 1 of 30 differ, encoder/layers_0/router/kernel",
            ],
        ),
        ({}, {"model": Seq2Seq(CONFIG, z_loss=0.1)}, ["objective/z_loss: there 0.0, here 0.1"]),
        (
            {},
            {"model": Seq2Seq(CONFIG.replace(dtype=jnp.bfloat16))},
            ["config/dtype: there 'float32', here 'bfloat16'"],
        ),
        (
            {},
            changed("decoder/decoder_norm/scale", lambda x: np.nextafter(x, 9)),
            ["the base's leaves: 1 of 29 differ, decoder/decoder_norm/scale"],
        ),
        (
            {},
            changed(ADAPTER, lambda x: -x),
            [f"the new leaves at the start: 1 of 5 differ, {ADAPTER}"],
        ),
        (  # another adapter to start from
            {},
            changed(ADAPTER, lambda x: x + 0.01),
            [f"the new leaves at the start: 1 of 5 differ, {ADAPTER}"],
        ),
    ],
)
def test_what_decides_the_result_is_listed_and_nothing_else(before, after, lines):
    assert differences(run_of(**before), run_of(**after)) == lines


@pytest.mark.parametrize(
    "change",
    [
        options(log_every=1, save_every=1, keep=9),
        # A head or an adapter that is drawn on another machine may differ in the last bits.
        changed(ADAPTER, lambda x: np.nextafter(x, 9)),
        {"optimizer": functools.partial(optax.adamw, b1=0.9)},
    ],
)
def test_what_does_not_decide_the_result_may_differ(change):
    assert differences(run_of(), run_of(**change)) == []


def test_any_optimizer_of_optax_is_described():
    """Also one that is only for trees of certain names, and one that computes with the rate."""

    def labelled(learning_rate):
        parts = {"a": optax.sgd(learning_rate), "b": optax.adam(learning_rate)}
        return optax.multi_transform(parts, {"encoder": "a", "decoder": "b"})

    def doubled(learning_rate):
        return optax.sgd(2 * learning_rate, momentum=0.5)

    for optimizer, part in ((labelled, "scale_by_adam"), (doubled, "trace")):
        found = run_of(optimizer=optimizer)["optimizer"]
        assert part in found and found["name"].endswith(optimizer.__name__)
    assert found["trace"]["decay"] == 0.5
    for name in ("adafactor", "lion", "rmsprop", "adagrad", "lamb", "novograd", "yogi"):
        found = run_of(optimizer=getattr(optax, name))["optimizer"]
        assert found["name"] == name and found["update"]


def test_long_values_are_shortened_to_where_they_differ():
    names = [f"label {number}" for number in range(100)]
    (line,) = differences({"x": names}, {"x": [*names[:60], "other", *names[61:]]})
    assert "'label 60'" in line and "'other'" in line and len(line) < 160


# --- A folder is of one run ---


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    """A folder with a checkpoint, as far as this module looks."""
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


def test_a_folder_without_a_checkpoint_takes_another_setting(tmp_path):
    """For example a smaller batch, after a first step that ran out of memory."""
    check_run(tmp_path, run_of())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text("damaged")
    check_run(tmp_path, run_of())


def test_a_run_that_only_its_export_is_left_of_is_not_overwritten(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(run_of()))
    (tmp_path / "export").mkdir()
    check_run(tmp_path, run_of())
    with pytest.raises(ValueError, match="other settings"):
        check_run(tmp_path, run_of(learning_rate=1.0))


def test_the_error_says_what_to_do(folder):
    (folder / "run.json").write_text(json.dumps(run_of()))
    check_run(folder, run_of())
    with pytest.raises(ValueError) as error:
        check_run(folder, run_of(learning_rate=1.0))
    assert str(error.value).splitlines() == [
        f"{folder} holds a run with other settings:",
        "  learning_rate/value: there 0.01, here 1.0",
        "Give these values again, or name another MODEL_DIR",
    ]
    for name, macro in (("export", "INITIAL_CHECKPOINT_PATH"), ("adapter", "INITIAL_ADAPTER_PATH")):
        exported = folder / "export" / ("" if name == "export" else name)
        exported.mkdir()
        with pytest.raises(ValueError, match=f"MODEL_DIR; {macro}={exported} goes on from its res"):
            check_run(folder, run_of(learning_rate=1.0))


def test_a_field_that_an_older_version_did_not_write_has_its_default(folder):
    older = run_of()
    routing = next(method for method in older["config"]["methods"] if method["name"] == "coda")
    del routing["noise"], older["options"]["reductions"], older["distillation"]
    (folder / "run.json").write_text(json.dumps(older))
    check_run(folder, run_of())
    with pytest.raises(ValueError, match=r"config/methods/coda/noise: there 0.0, here 0.5"):
        check_run(folder, run_of(**methods(noise=0.5)))


def test_checkpoints_of_an_unknown_run_are_refused(folder):
    with pytest.raises(ValueError, match=r"checkpoints of steps \[3\], but no run.json"):
        check_run(folder, run_of())


@pytest.mark.parametrize(("version", "found"), [({}, "1"), ({"format_version": 2}, "2")])
def test_a_run_of_another_version_is_not_continued(folder, version, found):
    (folder / "run.json").write_text(json.dumps({**version, "name": "test"}))
    sentence = (
        f"holds a run of format_version={found}, which this version .3. cannot continue: "
        "`coda convert` turns it into a checkpoint or an adapter"
    )
    with pytest.raises(ValueError, match=sentence):
        check_run(folder, run_of())


def test_a_damaged_description_is_named(folder):
    (folder / "run.json").write_text('{"format_version": 3, "na')
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON"):
        check_run(folder, run_of())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"devices": jax.devices()[:1]}, "'devices': 1"),
        ({"mesh": {"model": 2}}, "'mesh': {'data': 1, 'model': 2}"),
    ],
)
def test_other_devices_and_another_mesh_are_said(folder, other, said, capsys):
    run = run_of()
    (folder / "run.json").write_text(json.dumps(run))
    run_identity.say_other_machine(folder, run)
    assert not capsys.readouterr().out
    run = run_of(placement=Placement(**other))
    check_run(folder, run)
    run_identity.say_other_machine(folder, run)
    line = capsys.readouterr().out
    assert said in line and "the last bits will differ" in line
