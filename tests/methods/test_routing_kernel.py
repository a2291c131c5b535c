"""The routing's kernel for GPUs, step by step on a CPU, against the plain formulation."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.methods import routing_kernel, selection
from coda_jax.methods.selection import capacity, num_selected


def rows(rng, length, reduction):
    """Scores with ties and both zeros, k and mask, of rows of many lengths, of which one is 0."""
    scores = rng.normal(size=(4, length)).astype(np.float32) * 3
    scores[:, length // 2] = scores[:, 0]
    scores[0, :3] = 0.0, -0.0, 0.0
    lengths = np.array([length, 0, 1, length // 2 + 1])[:, None]
    k = num_selected(jnp.asarray(lengths), reduction)
    return jnp.asarray(scores), k, jnp.arange(length) < lengths


@pytest.mark.parametrize(
    ("length", "reduction", "epsilon"),
    [(3, 2.0, 1.0), (64, 3.0, 0.02), (100, 2.5, 1.0), (1100, 8.0, 0.1)],
)
def test_it_picks_and_weighs_as_the_plain_formulation(length, reduction, epsilon, rng):
    arguments = rows(rng, length, reduction)
    options = {"num_slots": capacity(length, reduction), "epsilon": epsilon}
    indices, valid, weights = routing_kernel.route(*arguments, **options, interpret=True)
    expected = selection._pick_and_weigh(*arguments, **options)
    np.testing.assert_array_equal(indices, expected[0])
    np.testing.assert_array_equal(valid, expected[1])
    np.testing.assert_allclose(weights, expected[2], rtol=1e-5, atol=1e-6)


@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.5, 1e-30, -1e30]), min_size=8, max_size=8))
def test_ties_go_to_the_earlier(scores):
    arguments = jnp.asarray([scores]), jnp.asarray([[3]]), jnp.ones((1, 8), bool)
    indices, valid, _ = route_8(*arguments)
    expected = np.sort(np.argsort(-np.asarray(scores, np.float32), kind="stable")[:3])
    assert indices[0].tolist() == expected.tolist() and valid.all()


route_8 = jax.jit(functools.partial(routing_kernel.route, num_slots=3, epsilon=1.0, interpret=True))


def test_the_derivative_is_that_of_the_plain_formulation(rng):
    scores, k, mask = rows(rng, 20, 3.0)
    factors = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)

    def gradient(pick_and_weigh):
        return jax.grad(lambda scores: (pick_and_weigh(scores)[2] * factors).sum())(scores)

    plain = functools.partial(selection._pick_and_weigh, num_slots=7, epsilon=0.5)
    expected = gradient(lambda scores: plain(scores, k, mask))
    found = gradient(lambda scores: selection._pick_and_weigh_by_kernel(7, 0.5, scores, k, mask))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"solver": "iterative"}, False),
        ({"segment_ids": jnp.ones((4, 20), jnp.int32)}, False),
    ],
)
def test_gpus_take_it_where_it_does_what_is_asked_for(options, taken, rng):
    scores, k, mask = rows(rng, 20, 3.0)

    def function(scores, k, mask):
        return selection.pick_and_weigh(scores, k, 7, mask, **options)

    lowered = jax.jit(function).trace(scores, k, mask).lower(lowering_platforms=("cuda",))
    assert ("__gpu$xla.gpu.triton" in lowered.as_text()) == taken
