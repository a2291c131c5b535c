"""Gather and scatter of a selection, against loops over its slots."""

import contextlib
import dataclasses
import functools

from helpers import as_on_tpu, layer_tokens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.nn.tokens import Beside, Selection


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

    tokens = layer_tokens(rng, batch=2)

    def scatter(x, delta, weights):
        weighted = dataclasses.replace(selection, weights=weights)
        return weighted.scatter_add(tokens.replace(x=x), delta)

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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("on_tpu", [False, True])
def test_what_is_beside_a_layer_is_added_to_every_token(on_tpu, dtype, rng):
    """In one product on TPUs; the gradients are those of two sums."""
    x, delta, cotangent, left = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in [(2, 12, 4), (2, 3, 4), (2, 12, 4), (2, 12, 5)]
    )
    right = jnp.asarray(rng.normal(size=(5, 4)), dtype)
    tokens, selection = layer_tokens(rng, batch=2), make_selection()

    def scatter(x, delta, left, right):
        beside = Beside(left @ right, left, right)
        return selection.scatter_add(tokens.replace(x=x, beside=beside), delta)

    with as_on_tpu() if on_tpu else contextlib.nullcontext():
        y, pullback = jax.vjp(scatter, x, delta, left, right)
        to_x, to_delta, to_left, to_right = (np.float32(g) for g in pullback(cotangent))
    x, delta, g, left, right = (np.float32(a) for a in (x, delta, cotangent, left, right))
    expected, expected_to_delta = x + left @ right, np.zeros_like(delta)
    for row, places in enumerate(selection.indices.tolist()):
        weights = np.array(selection.weights[row])[:, None]
        expected[row, places] += weights * delta[row]
        expected_to_delta[row] = weights * g[row, places]
    rounding = 0.03 if dtype == jnp.bfloat16 else 1e-5
    close = functools.partial(np.testing.assert_allclose, rtol=rounding, atol=rounding)
    assert y.dtype == dtype
    close(np.float32(y), expected)
    close(to_x, g)
    close(to_delta, expected_to_delta)
    close(to_left, g @ right.T)
    close(to_right, np.einsum("bna,bnd->ad", left, g), atol=4 * rounding)
