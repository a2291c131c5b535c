"""The trainer: what it changes, what it must not, and which steps it takes."""

import dataclasses
import json

from helpers import assert_same_tree, random_params
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import CONFIG, OPTIONS, Quick, make_batches, run

from coda_jax import methods, trees
from coda_jax.methods import Full
from coda_jax.objectives import OBJECTIVES, Seq2Seq
from coda_jax.sharding import Placement
from coda_jax.training import steps, trainer

WITHOUT_DROPOUT = CONFIG.replace(dropout_rate=0.0)


@pytest.fixture(name="finished", scope="module")
def fixture_finished(tmp_path_factory):
    """A run of six steps."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, *run(directory)


def first_state(params, optimizer):
    """The state before the first step."""
    return steps.TrainState(jnp.int32(0), params, optimizer.init(params))


# --- What is trained ---


def test_frozen_leaves_keep_their_bits_and_trained_ones_change(finished):
    """Invariant 5, through the trainer."""
    _, before, after, _ = finished
    before, after = trees.flatten(before), trees.flatten(after)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        same = np.array_equal(leaf, after[path])
        assert same != trees.matches(path, methods.trained(CONFIG)), path


@pytest.mark.all
def test_only_trained_leaves_have_gradients_and_optimizer_state():
    params, optimizer = random_params(CONFIG), optax.adamw(1e-3)
    trained, frozen = steps.partition(Seq2Seq(CONFIG), params)
    step = steps.make_train_step(Seq2Seq(CONFIG), optimizer, 1, 0)
    state, batch = first_state(trained, optimizer), next(make_batches())
    out, _ = jax.eval_shape(step, state, frozen, batch)
    moments = [leaf for leaf in jax.tree.leaves(out.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * trees.count(trained)
    # The compiled step returns nothing of the size of a frozen kernel: no gradient leaves it, and
    # XLA drops what nobody reads.
    full = steps.make_train_step(Seq2Seq(CONFIG), optimizer, 1, 0)
    everything = first_state(params, optimizer)

    def flops(step, *arguments):
        return step.lower(*arguments).compile().cost_analysis()["flops"]

    assert flops(step, state, frozen, batch) < 0.8 * flops(full, everything, {}, batch)


def test_what_is_trained_follows_from_the_methods():
    params = random_params(CONFIG)
    every = CONFIG.replace(methods=(*CONFIG.methods, Full()))
    trained, frozen = steps.partition(Seq2Seq(every), params)
    assert trees.count(trained) == trees.count(params) and not frozen
    with pytest.raises(ValueError, match="nothing is trained: the config has no methods"):
        steps.partition(Seq2Seq(CONFIG.dense()), params)


def test_the_leaves_of_an_objective_are_trained_too():
    class Headed(Seq2Seq):
        """With a head of its own."""

        creates = (r"^new_head/",)

    params = {**random_params(CONFIG), "new_head": {"kernel": np.zeros(3, np.float32)}}
    assert "new_head" in steps.partition(Headed(CONFIG), params)[0]
    assert "new_head" in steps.partition(Seq2Seq(CONFIG), params)[1]


def test_the_first_line_tells_the_trained_share(finished, capsys):
    print(trainer.describe(Seq2Seq(CONFIG), finished[1]))
    total = trees.count(finished[1])
    share = trees.count(methods.partition(CONFIG, finished[1])[0])
    line = capsys.readouterr().out
    assert f"{total:,} in total, {share:,} trained ({share / total:.2%}" in line
    assert "coda, parallel_adapter" in line


# --- Steps ---


class Halved(Full):
    """Full tuning with half the update."""

    name = "full"

    def wrap_optimizer(self, optimizer):
        """The optimizer's updates, halved."""
        return optax.chain(optimizer, optax.scale(0.5))


def test_gradients_are_clipped_and_each_method_has_its_part_of_a_step():
    params, gradients = {"kernel": jnp.zeros(4)}, {"kernel": jnp.full(4, 10.0)}

    def update(method, max_grad_norm):
        model = Seq2Seq(CONFIG.replace(methods=(method,)))
        transform = steps.make_optimizer(model, optax.sgd, 1.0, max_grad_norm)
        updates, _ = transform.update(gradients, transform.init(params), params)
        return np.asarray(updates["kernel"])

    np.testing.assert_allclose(update(Full(), None), -10.0)
    np.testing.assert_allclose(update(Full(), 1.0), -0.5)
    np.testing.assert_allclose(update(Halved(), 1.0), -0.25)


@pytest.mark.all
def test_accumulation_changes_nothing_but_rounding(tmp_path):
    """SGD without a limit of the gradient, so that its scale shows."""
    found = []
    for accumulation in (1, 2):
        options = dataclasses.replace(OPTIONS, accumulation=accumulation, max_grad_norm=None)
        given = {"cfg": WITHOUT_DROPOUT, "options": options, "optimizer": optax.sgd}
        before, after, _ = run(tmp_path / str(accumulation), **given)
        found.append(after)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert max(jax.tree.leaves(moved)) > 1e-2


@pytest.mark.parametrize("mesh", [None, {"model": 2}])
def test_two_devices_give_the_gradients_of_one(mesh, tmp_path):
    assert len(jax.local_devices()) == 2
    options = dataclasses.replace(OPTIONS, total_steps=1, max_grad_norm=None)
    given = {"cfg": WITHOUT_DROPOUT, "options": options, "optimizer": optax.sgd}
    given |= {"learning_rate": 1.0}
    one = Placement(devices=jax.local_devices()[:1])
    _, expected, expected_metrics = run(tmp_path / "one", placement=one, **given)
    _, found, metrics = run(tmp_path / "two", placement=Placement(mesh), **given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)


def test_a_run_over_a_mesh_goes_on_with_the_same_bits(tmp_path, capsys):
    given = {"model": Quick, "placement": Placement({"model": 2})}
    _, expected, metrics = run(tmp_path / "uncut", **given)
    with pytest.raises(ValueError, match="the data ended after 3 of 6"):
        run(tmp_path, batches=make_batches(3), **given)
    _, found, found_metrics = run(tmp_path, **given)
    assert_same_tree(found, expected)
    assert found_metrics == metrics
    assert "the run began" not in capsys.readouterr().out
    run(tmp_path, **given | {"placement": Placement()})
    assert "'mesh': {'data': 1, 'model': 2}} and goes on on " in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    """Invariant 6."""

    def schedule(step):
        return jnp.where(step < 3, 1e-3, 1e38)  # the update of the fourth step is no number

    with pytest.raises(FloatingPointError, match=r"the loss of step 5 is (nan|inf)"):
        run(tmp_path, learning_rate=schedule)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_data_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="the data ended after 4 of 6 batches"):
        run(tmp_path, batches=make_batches(4))


def test_the_best_checkpoint_is_kept_and_returned(tmp_path):
    options = dataclasses.replace(OPTIONS, total_steps=8, save_every=2, keep=1, best_metric="loss")

    def schedule(step):
        return jnp.where(step < 4, 1e-2, 0.5)  # good steps first, then wild ones

    _, _, metrics = run(tmp_path, options=options, learning_rate=schedule)
    best, newest = sorted((tmp_path / "checkpoints").iterdir())
    assert int(best.name) < 8 and newest.name == "8"
    contents = json.loads((best / "contents" / "metadata").read_text())
    assert contents["evaluation"] == metrics


@pytest.mark.parametrize("model", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_direction_follows_the_metric(model):
    better = {"loss": "min", "mean_absolute_error": "min"}
    for name, metric in model.metrics.items():
        assert metric.better == better.get(name, "max")
        options = dataclasses.replace(OPTIONS, best_metric=name)
        assert options.best_mode(model, evaluates=True) == metric.better


def test_a_metric_that_will_not_be_there_is_refused_before_training(tmp_path):
    options = dataclasses.replace(OPTIONS, best_metric="acuracy")
    with pytest.raises(ValueError, match=r"best_metric='acuracy' must be one of \['loss', 'token_"):
        run(tmp_path, options=options)
    options = dataclasses.replace(OPTIONS, best_metric="loss")
    with pytest.raises(ValueError, match="best_metric='loss' needs data to evaluate on"):
        run(tmp_path, options=options, eval_batches=None)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("rate", [-1, 0, float("nan"), "0.1", lambda step: -step, lambda step: 0.0])
def test_a_learning_rate_that_is_none_is_refused_before_training(tmp_path, rate):
    with pytest.raises(ValueError, match="learning_rate"):
        run(tmp_path, learning_rate=rate)
    assert not [*tmp_path.iterdir()]


def test_nothing_to_evaluate_on_is_an_error():
    with pytest.raises(ValueError, match="no batch to evaluate on"):
        trainer.evaluate(Seq2Seq(CONFIG), {}, [], Placement())


@pytest.mark.parametrize(
    "changes", [{"total_steps": 0}, {"accumulation": 0}, {"save_every": 0}, {"best_metric": 1}]
)
def test_bad_options_are_named(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        trainer.TrainOptions(**{"total_steps": 1} | changes)
