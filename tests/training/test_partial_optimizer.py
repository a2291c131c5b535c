"""T5X's optimizers for a part of the parameters, with a definition like T5X's but without T5X."""

from flax.core import FrozenDict, freeze
import jax
import jax.numpy as jnp
import optax
from optimizer_definitions import Wrapper
import pytest

from coda_jax.training.partial_optimizer import PartialOptimizer, steps_taken

PARAMS = {"layer": {"new": {"kernel": jnp.ones((4, 2))}, "old": {"kernel": jnp.ones((4, 2))}}}
AXES = {"layer": {"new": {"kernel": ("embed", "mlp")}, "old": {"kernel": ("embed", "mlp")}}}


@pytest.mark.parametrize(
    ("optimizer", "divided"),
    [(optax.adam(0.1), 2), (optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9), 1)],
)
def test_frozen_leaves_are_not_seen_and_state_is_divided_as_what_is_trained(optimizer, divided):
    params = freeze(PARAMS)
    definition = PartialOptimizer(Wrapper(optimizer), ("new/",))
    made = definition.create(params)
    assert made.optimizer_def is definition and made.target is params
    after, state = definition.apply_gradient(None, params, made.state, params)
    assert isinstance(after, FrozenDict) and steps_taken(state.param_states) == 1
    assert after["layer"]["old"]["kernel"] is params["layer"]["old"]["kernel"]
    assert (after["layer"]["new"]["kernel"] != 1).all()
    axes = definition.derive_logical_axes(made, freeze(AXES))
    assert axes.target == freeze(AXES)
    leaves = jax.tree.leaves(axes.state.param_states, is_leaf=lambda x: x == ("embed", "mlp"))
    assert leaves == [("embed", "mlp")] * divided


def test_an_optimizer_that_counts_no_steps_is_known():
    assert steps_taken(optax.sgd(0.1).init(PARAMS)) is None
