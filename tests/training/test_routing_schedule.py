"""Which routing each step trains."""

import collections
import dataclasses

from helpers import assert_same_tree
import numpy as np
import pytest
from training_runs import CONFIG, OPTIONS, make_batches, run

from coda_jax.methods import Coda, ParallelAdapter, epsilon_of, reduction_of
from coda_jax.objectives import Seq2Seq
from coda_jax.training import steps
from coda_jax.training.routing_schedule import STAGES, routed
from coda_jax.training.trainer import TrainOptions

METHODS = (Coda(3.0, epsilon=0.1), ParallelAdapter(4))


def test_without_options_each_step_routes_as_the_model():
    assert routed(METHODS, 5, total_steps=10, seed=0) == METHODS
    assert routed((ParallelAdapter(4),), 5, total_steps=10, seed=0) == (ParallelAdapter(4),)


def test_every_step_draws_one_of_the_reductions():
    given = {"total_steps": 600, "seed": 3, "reductions": (2, 3.5, (1, 8))}
    drawn = [reduction_of(routed(METHODS, step, **given)) for step in range(600)]
    counts = collections.Counter(drawn)
    assert counts.keys() == {2, 3.5, (1, 8)} and min(counts.values()) > 150
    assert drawn == [reduction_of(routed(METHODS, step, **given)) for step in range(600)]
    other = [reduction_of(routed(METHODS, s, **given | {"seed": 4})) for s in range(600)]
    assert drawn != other


def test_epsilon_falls_in_stages_to_that_of_the_model():
    given = {"total_steps": 80, "seed": 0, "epsilon_start": 10.0}
    found = [epsilon_of(routed(METHODS, step, **given)) for step in range(80)]
    expected = np.repeat(np.geomspace(10.0, 0.1, STAGES), 10)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(set(found)) == STAGES
    short = {"total_steps": 3, "seed": 0, "epsilon_start": 10.0}
    found = [epsilon_of(routed(METHODS, step, **short)) for step in range(3)]
    np.testing.assert_allclose(found, [10.0, 1.0, 0.1])
    assert epsilon_of(routed(METHODS, 0, **short | {"total_steps": 1})) == 0.1


def test_reductions_rise_to_those_of_the_model_in_the_first_half():
    given = {"total_steps": 80, "seed": 0, "reduction_start": 1.0}
    found = [reduction_of(routed(METHODS, step, **given)) for step in range(80)]
    expected = np.repeat(np.geomspace(1.0, 3.0, STAGES), 5)
    np.testing.assert_allclose(found, [*expected, *[3.0] * 40], rtol=1e-6)
    assert found[0] == 1 and found[-1] == 3  # exactly
    layers = routed((Coda((1, 8)),), 20, **given)
    np.testing.assert_allclose(reduction_of(layers), (1, 8 ** (4 / 7)))
    drawn = [reduction_of(routed(METHODS, s, **given, reductions=(2, 4))) for s in range(80)]
    assert drawn[0] == 1 and {*drawn[40:]} == {2, 4} and max(drawn[:20]) < 4


def test_programs_are_made_once_for_each_way_to_route():
    made = []
    options = TrainOptions(100, reductions=(2, 4), epsilon_start=None)
    model = Seq2Seq(CONFIG)

    def make(routed):
        made.append(routed)
        return routed

    step = steps.steps_of(model, lambda number: options.methods_of(model, number), make)
    found = [reduction_of(step(number).config.methods) for number in range(100)]
    assert len(made) == 2 and {*found} == {2, 4}
    assert all(other.module.config == other.config for other in made)


@pytest.mark.parametrize(
    "changes", [{"reductions": (2, 4)}, {"reduction_start": 1}, {"epsilon_start": 4.0}]
)
def test_a_model_without_routing_is_refused(changes, tmp_path):
    cfg = CONFIG.replace(methods=(ParallelAdapter(4),))
    with pytest.raises(ValueError, match="is given for a model that does not route"):
        run(tmp_path, cfg=cfg, options=dataclasses.replace(OPTIONS, **changes))


def test_what_a_later_step_would_draw_is_checked_before_the_first(tmp_path):
    options = dataclasses.replace(OPTIONS, reductions=(2, (1, 2, 3)))
    with pytest.raises(ValueError, match="3 entries for 1 encoder layers"):
        run(tmp_path, options=options)
    sigmoid = dataclasses.replace(OPTIONS, epsilon_start=2.0)
    with pytest.raises(ValueError, match=r"epsilon=2\.0 has no effect with routing='sigmoid'"):
        run(tmp_path, options=sigmoid)


@pytest.mark.parametrize(
    "changes",
    [
        {"reductions": ()},
        {"reductions": (2, 0.5)},
        {"reduction_start": 0.5},
        {"epsilon_start": 0},
    ],
)
def test_values_out_of_range_are_named(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=rf"TrainOptions\.{name}(\[1\])? must be"):
        TrainOptions(10, **changes)


def test_a_run_over_reductions_goes_on_with_the_same_bits(tmp_path):
    options = dataclasses.replace(OPTIONS, reductions=(1, 2), save_every=2, total_steps=4)
    _, expected, metrics = run(tmp_path / "uncut", options=options)
    with pytest.raises(ValueError, match="the data ended after 2 of 4"):
        run(tmp_path / "cut", options=options, batches=make_batches(2))
    _, found, found_metrics = run(tmp_path / "cut", options=options)
    assert_same_tree(found, expected)
    assert metrics == found_metrics
