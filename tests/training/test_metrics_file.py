"""`metrics.csv`: what it holds, and that a cut run writes the bytes of an uncut one."""

import dataclasses
import functools
import os
import signal

import numpy as np
import pytest
import training_runs
from training_runs import Quick, make_batches

from coda_jax.training.metrics_file import METRICS, MetricsFile, read_metrics
from coda_jax.training.run_directory import Interruption

OPTIONS = dataclasses.replace(training_runs.OPTIONS, total_steps=12, save_every=6, log_every=4)
run = functools.partial(training_runs.run, model=Quick, options=OPTIONS)


@pytest.fixture(name="uncut", scope="module")
def fixture_uncut(tmp_path_factory):
    """The folder and the metrics of a run of twelve steps."""
    directory = tmp_path_factory.mktemp("uncut")
    return directory, run(directory)[2]


class Killed(Exception):
    """Stands for a kill: nothing is saved after it."""


def cut_at(number, kill=False):
    """Batches; a run is asked to stop, or ends without a word, when it takes one of them."""
    for place, batch in enumerate(make_batches(), start=1):
        if place == number and kill:
            raise Killed
        if place == number:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def stopping():
    """Evaluation data; the run is asked to stop before the last of its batches."""
    first, last = make_batches(2)
    yield first
    os.kill(os.getpid(), signal.SIGTERM)
    yield last


def test_each_step_has_a_row_and_what_was_not_measured_is_empty(uncut):
    directory, metrics = uncut
    header, *rows = (directory / METRICS).read_text().splitlines()
    names = ["loss", "token_accuracy", "exact_match"]
    assert header.split(",") == ["step", *names, "learning_rate", *(f"eval/{x}" for x in names)]
    assert [row.split(",")[0] for row in rows] == ["4", "6", "8", "12"]
    assert [row.endswith(",,,") for row in rows] == [True, False, True, False]
    found = read_metrics(directory)
    assert {name: found[f"eval/{name}"][-1] for name in names} == {
        name: (12, metrics[name]) for name in names
    }
    assert [step for step, _ in found["eval/loss"]] == [6, 12]
    assert found["learning_rate"] == [(step, 0.01) for step in (4, 6, 8, 12)]


def test_the_loss_of_a_row_is_the_mean_since_the_row_before(uncut, tmp_path):
    run(tmp_path, options=dataclasses.replace(OPTIONS, log_every=1))
    each = [value for _, value in read_metrics(tmp_path)["loss"]]
    assert len(each) == 12
    rows = [value for _, value in read_metrics(uncut[0])["loss"]]  # equal weights in each step
    expected = [np.mean(each[a:b]) for a, b in ((0, 4), (4, 6), (6, 8), (8, 12))]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)


def more(*cuts, name):
    """A case of `make test-all`."""
    return pytest.param([*cuts], id=name, marks=pytest.mark.all)


@pytest.mark.parametrize(
    "cuts",
    [
        more({"batches": lambda: cut_at(3)}, name="once"),
        pytest.param(  # without a row between them
            [{"batches": lambda: cut_at(9)}, {"batches": lambda: cut_at(11)}],
            id="twice",
            marks=pytest.mark.all,
        ),
        more({"batches": lambda: cut_at(4)}, {"batches": lambda: cut_at(6)}, name="at_rows"),
        more({"eval_batches": stopping}, name="in_evaluation"),
        more({"batches": lambda: cut_at(11, kill=True)}, name="killed"),
        more(
            {"batches": lambda: cut_at(7)},
            {"batches": lambda: cut_at(9, kill=True)},
            name="stopped_then_killed",
        ),
    ],
)
def test_a_run_that_was_cut_off_writes_the_bytes_of_an_uncut_one(tmp_path, uncut, cuts):
    for cut in cuts:
        given = {name: make() if name == "batches" else make for name, make in cut.items()}
        with pytest.raises((Interruption, Killed)):
            run(tmp_path, **given)
    run(tmp_path)
    assert (tmp_path / METRICS).read_bytes() == (uncut[0] / METRICS).read_bytes()


def test_a_row_that_a_kill_cut_off_is_dropped(tmp_path, uncut):
    with pytest.raises(Killed):
        run(tmp_path, batches=cut_at(9, kill=True))
    whole = (tmp_path / METRICS).read_text()
    (tmp_path / METRICS).write_text(whole + "1")  # of "12,..."; alone it would be step 1
    assert [step for step, _ in read_metrics(tmp_path)["loss"]] == [4, 6, 8]
    run(tmp_path)
    assert (tmp_path / METRICS).read_bytes() == (uncut[0] / METRICS).read_bytes()


def test_a_finished_run_leaves_the_file_as_it_is(uncut):
    before = (uncut[0] / METRICS).read_bytes()
    run(uncut[0])
    assert (uncut[0] / METRICS).read_bytes() == before


def test_columns_may_come_later_and_go_with_the_rows_that_have_them(tmp_path):
    table = MetricsFile(tmp_path, 0)
    table.write(2, {"loss": 0.5})
    table.write(4, {"loss": 0.25, "a, b": 1e-30})
    table.write(4, {"eval/loss": np.float32(0.1)})
    table.write(6, {"loss": 3})
    text = (tmp_path / METRICS).read_text()
    assert text == (
        'step,loss,"a, b",eval/loss\n2,0.5,,\n4,0.25,1e-30,0.10000000149011612\n6,3.0,,\n'
    )
    MetricsFile(tmp_path, 5)
    assert read_metrics(tmp_path)["loss"] == [(2, 0.5), (4, 0.25)]
    MetricsFile(tmp_path, 3)
    assert (tmp_path / METRICS).read_text() == "step,loss\n2,0.5\n"
    MetricsFile(tmp_path, 1)  # a run that saved nothing starts anew
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_removed_while_a_run_writes_comes_back_whole(tmp_path):
    table = MetricsFile(tmp_path, 0)
    table.write(2, {"loss": 0.5})
    (tmp_path / METRICS).unlink()
    table.write(4, {"loss": 0.25})
    assert read_metrics(tmp_path) == {"loss": [(2, 0.5), (4, 0.25)]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"step;loss\n2;0,5\n", "metrics.csv:1 .*first column is 'step;loss'"),
        (b"step,loss\n2,0.5\n4,x\n", "metrics.csv:3 .*'x'"),
        (b"step,loss\n2,0.5\n4,0.5,1\n", "metrics.csv:3 .*2 values of 1 metrics"),
        (b"step,loss\n4,0.5\n2,0.5\n", "metrics.csv:3 .*step 2 is not behind step 4"),
        (b"step,loss\n\xff\n", "metrics.csv:2 .*0 values of 1 metrics"),
        (b"\n", "metrics.csv:1 "),
    ],
)
def test_a_file_that_no_run_writes_is_refused_and_stays(tmp_path, content, named):
    (tmp_path / METRICS).write_bytes(content)
    for use in (read_metrics, lambda folder: MetricsFile(folder, 0)):
        with pytest.raises(ValueError, match=f"{named}.*: move the file away"):
            use(tmp_path)
    assert (tmp_path / METRICS).read_bytes() == content


def test_a_folder_without_the_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv does not exist"):
        read_metrics(tmp_path)
