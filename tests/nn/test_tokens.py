"""Gather and scatter of a selection, against loops over its slots."""

import dataclasses

from helpers import layer_tokens
import jax
import jax.numpy as jnp
import numpy as np

from coda_jax.nn.tokens import Selection


def make_selection():
    return Selection(
        indices=jnp.array([[0, 3, 11], [1, 2, 5]]),
        weights=jnp.array([[0.5, 1.0, 0.25], [2.0, 0.0, 0.0]]),
        valid=jnp.array([[True, True, True], [True, False, False]]),
    )


def test_gather_takes_the_selected_tokens(rng):
    tokens = layer_tokens(rng, batch=2, segment_ids=np.sort(rng.integers(1, 4, (2, 12))))
    selection = make_selection()
    gathered = selection.gather(tokens)
    for row in range(2):
        for slot, position in enumerate(selection.indices[row].tolist()):
            np.testing.assert_array_equal(gathered.x[row, slot], tokens.x[row, position])
            np.testing.assert_array_equal(gathered.u[row, slot], tokens.u[row, position])
            assert gathered.segment_ids[row, slot] == tokens.segment_ids[row, position]
            assert gathered.positions[row, slot] == position
    np.testing.assert_array_equal(gathered.mask, selection.valid)
    assert selection.gather(dataclasses.replace(tokens, segment_ids=None)).segment_ids is None


def test_scatter_add_and_its_gradients(rng):
    x = rng.normal(size=(2, 12, 4)).astype(np.float32)
    delta = rng.normal(size=(2, 3, 4)).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    selection = make_selection()

    def scatter(x, delta, weights):
        return dataclasses.replace(selection, weights=weights).scatter_add(x, delta)

    y, pullback = jax.vjp(scatter, x, delta, selection.weights)
    to_x, to_delta, to_weights = pullback(jnp.asarray(cotangent))
    expected = x.copy()
    for row in range(2):
        for slot, position in enumerate(selection.indices[row].tolist()):
            weight = float(selection.weights[row, slot])
            expected[row, position] += weight * delta[row, slot]
            g = cotangent[row, position]
            np.testing.assert_allclose(to_delta[row, slot], weight * g, atol=1e-6)
            np.testing.assert_allclose(to_weights[row, slot], g @ delta[row, slot], atol=1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_array_equal(to_x, cotangent)
