"""The best evaluation, and runs that end early: the same wherever they were cut off."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_runs
from training_runs import Quick, make_batches

from coda_jax.training.best import Best
from coda_jax.training.metrics_file import METRICS, read_metrics
from coda_jax.training.options import TrainOptions
from coda_jax.training.run_checkpoints import RunCheckpoints
from coda_jax.training.run_directory import Interruption, saved_steps
from coda_jax.training.steps import TrainState

OPTIONS = dataclasses.replace(
    training_runs.OPTIONS,
    total_steps=20,
    save_every=2,
    log_every=3,
    keep=1,
    best_metric="loss",
    patience=3,
)


def schedule(step):
    """Good steps first, then wild ones."""
    return jnp.where(step < 5, 1e-2, 0.5)


run = functools.partial(training_runs.run, model=Quick, options=OPTIONS, learning_rate=schedule)


@pytest.fixture(name="whole", scope="module")
def fixture_whole(tmp_path_factory):
    """{step: loss} of all evaluations of a run without patience."""
    directory = tmp_path_factory.mktemp("whole")
    run(directory, options=dataclasses.replace(OPTIONS, patience=None))
    return dict(read_metrics(directory)["eval/loss"])


@pytest.fixture(name="ended", scope="module")
def fixture_ended(tmp_path_factory):
    """The folder of a run that ended early, its parameters and its metrics."""
    directory = tmp_path_factory.mktemp("ended")
    return directory, *run(directory)[1:]


def end_of(losses, patience):
    """(the step at which a run ends, the best step): counted back from each evaluation."""
    steps = sorted(losses)
    for place, step in enumerate(steps):
        best = min(steps[: place + 1], key=lambda x: (losses[x], x))
        if place - steps.index(best) >= patience:
            return step, best
    raise AssertionError("there is no end")


def test_a_run_ends_when_its_patience_does_and_gives_the_best(ended, whole, capsys):
    directory, after, metrics = ended
    last, best = end_of(whole, patience=3)
    assert 2 < best < last < 20
    assert metrics["loss"] == whole[best]
    assert saved_steps(directory) == [best, last]
    assert dict(read_metrics(directory)["eval/loss"]) == {x: whole[x] for x in whole if x <= last}
    capsys.readouterr()
    _, again, again_metrics = run(directory)
    said = capsys.readouterr().out
    assert f"the run is finished: by its patience it ended at step {last} of 20" in said
    jax.tree.map(np.testing.assert_array_equal, again, after)
    assert again_metrics == metrics


def test_each_evaluation_has_a_line_that_names_the_best(tmp_path, whole, capsys):
    run(tmp_path)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    last, best = end_of(whole, patience=3)
    assert [int(line.split()[1].rstrip(":")) for line in lines] == list(range(2, last + 1, 2))
    assert lines[best // 2 - 1].endswith("(the best loss so far)")
    was = f"(the best loss was {whole[best]:.4f} at step {best}, "
    assert lines[-2].endswith(f"{was}2 evaluations before)")
    assert lines[-1].endswith(f"{was}3 evaluations before: the run ends, patience=3)")


def cut_at(number):
    """Batches; the run is asked to stop when it takes one of them."""
    for place, batch in enumerate(make_batches(), start=1):
        if place == number:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def stopping(evaluations):
    """Evaluation data; the run is asked to stop in the middle of the last of so many passes."""
    passes = iter(range(1, evaluations + 1))

    def batches():
        number = next(passes)
        for place, batch in enumerate(make_batches(2)):
            if place == 1 and number == evaluations:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return batches


CUTS = {  # {name: (the best step, the last) -> what the run is given}
    "early": lambda best, last: {"batches": cut_at(3)},
    "waiting": lambda best, last: {"batches": cut_at(best + 3)},
    "last": lambda best, last: {"batches": cut_at(last)},
    "in_the_best": lambda best, last: {"eval_batches": stopping(best // 2)},
    "in_the_last": lambda best, last: {"eval_batches": stopping(last // 2)},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.all) for x in CUTS],
)
def test_a_run_that_was_cut_off_ends_at_the_same_step(tmp_path, ended, whole, name):
    last, best = end_of(whole, patience=3)
    with pytest.raises(Interruption):
        run(tmp_path, **CUTS[name](best, last))
    _, after, metrics = run(tmp_path)
    assert metrics == ended[2]
    jax.tree.map(np.testing.assert_array_equal, after, ended[1])
    assert saved_steps(tmp_path) == [best, last]
    assert (tmp_path / METRICS).read_bytes() == (ended[0] / METRICS).read_bytes()


@pytest.mark.parametrize(
    ("mode", "values", "waited"),
    [
        ("min", [3.0, 2.0, 2.0, 2.5, 1.0, 1.0], [0, 0, 1, 2, 0, 1]),
        ("max", [0.1, 0.3, 0.2, 0.3, 0.4], [0, 0, 1, 2, 0]),
    ],
)
def test_as_good_is_not_better(mode, values, waited):
    best = Best("x", mode, patience=2)
    for step, (value, expected) in enumerate(zip(values, waited, strict=True), start=1):
        best.note(step, {"x": value, "other": -step})
        assert best.carried["waited"] == expected
        assert best.is_over == (expected == 2)


def test_what_is_evaluated_before_the_model_is_what_was_asked_for_does_not_count(tmp_path):
    values = {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.8, 5: 0.85}  # less is better
    best = Best("loss", "min", patience=2, first=3)
    with RunCheckpoints(tmp_path, {"name": "x"}, 3, "loss", "min", 3) as checkpoints:
        for step, value in values.items():
            best.note(step, {"loss": value})
            state = TrainState(jnp.int32(step), {"x": jnp.full(2, float(step))}, ())
            checkpoints.save(state, {"loss": value}, {})
        assert checkpoints.best(state).state.step == 4
    assert best.carried == {"step": 4, "value": 0.8, "waited": 1}
    assert saved_steps(tmp_path) == [3, 4, 5]


def test_a_checkpoint_of_an_older_version_counts_as_an_evaluation():
    best = Best("x", "min", patience=1)
    best.go_on(4, {"x": 2.0}, None)
    best.note(6, {"x": 2.0})
    assert best.is_over and best.carried == {"step": 4, "value": 2.0, "waited": 1}


def test_of_equal_evaluations_the_first_is_exported(tmp_path):
    """As the line of each evaluation says."""
    with RunCheckpoints(tmp_path, {"name": "x"}, 3, "loss", "min") as checkpoints:
        for step in (1, 2, 3):
            state = TrainState(jnp.int32(step), {"x": jnp.full(2, float(step))}, ())
            checkpoints.save(state, {"loss": 1.0 if step > 1 else 2.0}, {})
        found = checkpoints.best(TrainState(jnp.int32(0), {"x": jnp.zeros(2)}, ()))
    assert int(found.state.step) == 2


def test_patience_needs_a_metric():
    with pytest.raises(ValueError, match=r"TrainOptions\.patience=3 needs a best_metric"):
        TrainOptions(10, patience=3)
