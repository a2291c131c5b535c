"""The trainer: what it changes, what it must not, and that a cut run ends like an uncut one."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from helpers import config, random_params, random_tokens, shift_right
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coda_jax import batches as batches_lib
from coda_jax import params as params_lib
from coda_jax import training
from coda_jax.models import EncoderDecoder
from coda_jax.run_files import Interruption

CONFIG = config(coda={"reduction": 2.0}, dropout_rate=0.1)
OPTIONS = training.TrainOptions(total_steps=6, save_every=3, log_every=2)


def make_batches(count=100, rows=4):
    """Batches of random tokens, the same at every call."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        inputs = random_tokens(rng, rng.integers(3, 9, rows), 8)
        targets = random_tokens(rng, rng.integers(1, 5, rows), 4)
        yield {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": shift_right(targets),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(np.int32),
        }


def run(directory, *, cfg=CONFIG, options=OPTIONS, batches=None, **changes):
    """Trains the tiny model; returns (its parameters before, after, metrics)."""
    before = random_params(cfg)
    arguments = {
        "optimizer": optax.adamw,
        "learning_rate": 1e-2,
        "run": {"name": "test"},
        "eval_batches": lambda: make_batches(2),
    } | changes
    after, metrics = training.train(
        EncoderDecoder(cfg),
        before,
        make_batches() if batches is None else batches,
        options=options,
        directory=directory,
        **arguments,
    )
    return before, after, metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, *run(directory)


def test_frozen_leaves_keep_their_bits_and_trained_ones_change(finished):
    _, before, after, _ = finished
    before, after = params_lib.flatten(before), params_lib.flatten(after)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        same = np.array_equal(leaf, after[path])
        assert same != params_lib.matches(path, params_lib.TRAINED["adapters"]), path


def test_only_trained_leaves_have_gradients_and_optimizer_state():
    params = random_params(CONFIG)
    trained, frozen = params_lib.partition(params)
    state = optax.adamw(1e-3).init(trained)
    step = training.make_train_step(EncoderDecoder(CONFIG), optax.adamw(1e-3), 1, 0)
    train_state = training.TrainState(jnp.int32(0), trained, state)
    batch = next(make_batches())
    out, _ = jax.eval_shape(step, train_state, frozen, batch)
    moments = [leaf for leaf in jax.tree.leaves(out.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * params_lib.count(trained)
    # The compiled step returns nothing of the size of a frozen kernel: no gradient leaves it, and
    # XLA drops what nobody reads.
    full = training.make_train_step(EncoderDecoder(CONFIG), optax.adamw(1e-3), 1, 0)
    everything = training.TrainState(jnp.int32(0), params, optax.adamw(1e-3).init(params))

    def flops(step, *arguments):
        return step.lower(*arguments).compile().cost_analysis()["flops"]

    assert flops(step, train_state, frozen, batch) < 0.8 * flops(full, everything, {}, batch)


def test_the_directory_tells_what_was_done(finished):
    directory, _, _, metrics = finished
    assert {"loss", "token_accuracy", "exact_match"} <= metrics.keys()
    assert json.loads((directory / "run.json").read_text()) == {"name": "test"}
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


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    cfg = config(coda={"reduction": 2.0}, dropout_rate=0.0)
    whole = run(tmp_path / "whole", cfg=cfg)[1]
    options = dataclasses.replace(OPTIONS, accumulation=2)
    parts = run(tmp_path / "parts", cfg=cfg, options=options)[1]

    def check(a, b):
        np.testing.assert_allclose(a, b, atol=2e-4)  # Adam divides by small numbers

    jax.tree.map(check, whole, parts)


def test_two_devices_give_the_gradients_of_one():
    assert len(jax.local_devices()) == 2
    cfg = config(coda={"reduction": 2.0}, dropout_rate=0.0)
    model, params, batch = EncoderDecoder(cfg), random_params(cfg), next(make_batches())
    trained, frozen = params_lib.partition(params)
    results = []
    for devices in (jax.local_devices(), jax.local_devices()[:1]):
        placement = training.Placement(devices)
        state = training.TrainState(jnp.int32(0), trained, optax.sgd(1.0).init(trained))
        step = training.make_train_step(model, optax.sgd(1.0), 1, 0)
        state, sums = step(
            placement.params(state), placement.params(frozen), placement.batch(batch)
        )
        results.append((state.trained, sums))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_rows_that_devices_cannot_share_are_refused():
    with pytest.raises(ValueError, match="3 rows cannot be shared by 2 devices"):
        training.Placement().batch(next(make_batches(rows=3)))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    def schedule(step):
        return jnp.where(step < 3, 1e-3, jnp.nan)  # the update of the fourth step is NaN

    with pytest.raises(FloatingPointError, match="the loss of step 5 is nan"):
        run(tmp_path, learning_rate=schedule)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_sigterm_saves_before_leaving(tmp_path):
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


def test_a_run_cut_by_sigterm_ends_like_an_uncut_one(tmp_path, finished):
    test_sigterm_saves_before_leaving(tmp_path)
    _, after, _ = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, after, finished[2])


def test_data_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="the data ended after 4 of 6 batches"):
        run(tmp_path, batches=make_batches(4))


def test_the_best_checkpoint_is_kept_and_returned(tmp_path):
    options = dataclasses.replace(
        OPTIONS, total_steps=8, save_every=2, keep=1, best_metric="loss", best_mode="min"
    )

    def schedule(step):
        return jnp.where(step < 4, 1e-2, 0.5)  # good steps first, then wild ones

    _, _, metrics = run(tmp_path, options=options, learning_rate=schedule)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert int(kept.name) < 8
    losses = json.loads((kept / "evaluation" / "metadata").read_text())
    assert losses == metrics


@pytest.mark.parametrize(
    "changes", [{"total_steps": 0}, {"accumulation": 0}, {"save_every": 0}, {"best_mode": "best"}]
)
def test_bad_options_are_named(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        training.TrainOptions(**{"total_steps": 1} | changes)


def test_the_first_line_tells_the_trained_share(finished, capsys):
    print(training.describe(finished[1], "adapters"))
    total = params_lib.count(finished[1])
    share = params_lib.count(params_lib.partition(finished[1])[0])
    assert f"{total:,} in total, {share:,} trained ({share / total:.2%}" in capsys.readouterr().out


# A run in a process of its own, on a host that has neither TensorFlow nor seqio.
SCRIPT = """
import sys
sys.path[:0] = {path!r}
for name in ("tensorflow", "seqio", "gin", "t5x"):
    sys.modules[name] = None
import optax
from coda_jax import runs, training
import test_training as t
from helpers import random_params
import numpy as np
model = runs.LoadedModel(t.CONFIG, random_params(t.CONFIG), None)
result, _ = runs.train(
    sys.argv[1], model,
    data=runs.Data({{"inputs": 8, "targets": 4}}, cache=sys.argv[2], batch_size=4),
    options=training.TrainOptions(60, save_every=5, log_every=5), optimizer=optax.adamw,
    learning_rate=1e-2)
from coda_jax import params
np.savez(sys.argv[1] + "/result.npz", **params.flatten(result.params))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache file of random examples."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("cache") / "examples.npz"
    examples = (
        {"inputs": rng.integers(2, 20, 6), "targets": rng.integers(2, 20, 3)} for _ in range(30)
    )
    batches_lib.write_cache(path, examples, {"vocabulary": "bytes", "vocab_size": 20})
    return path


def start(directory, cache):
    """Starts the script; pytest itself is not importable there, so neither is seqio through it."""
    path = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(path=path), str(directory), str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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
