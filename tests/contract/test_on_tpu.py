"""What TPUs compute in another way gives the same numbers: those formulations, run here."""

import functools

from contract.programs import (
    LENGTHS,
    batch_of,
    in_bfloat16,
    inputs_of,
    mask_of,
    params,
    relative_error,
    tokens_of_equal_choices,
)
from contract.table import each_case, routed
from helpers import TINY_SPEECH, as_on_tpu, encode, random_frames
import jax
import numpy as np
import pytest

from coda_jax.methods import Coda
from coda_jax.objectives import model_for


def encoder_of(config):
    """A new program, which is traced anew: `encode` of the config."""
    return jax.jit(functools.partial(encode.__wrapped__, config))


@each_case("tpu")
def test_outputs_and_choices_are_the_same(case):
    config, inputs, mask = case.config, inputs_of(case.config), mask_of(LENGTHS)
    expected, chosen = encoder_of(config)(params(config), inputs)
    with as_on_tpu():
        found, on_tpu = encoder_of(config)(params(config), inputs)
    np.testing.assert_allclose(found[mask], expected[mask], atol=2e-5)
    assert chosen.keys() == on_tpu.keys()
    for layer, selection in chosen.items():
        np.testing.assert_array_equal(on_tpu[layer].indices, selection.indices)
        np.testing.assert_array_equal(on_tpu[layer].valid, selection.valid)
        np.testing.assert_allclose(on_tpu[layer].weights, selection.weights, atol=1e-5)


@each_case("budget", where=routed)
def test_packed_rows_are_the_same(case):
    """Segments of unequal lengths and padding behind them; too many of them are seen."""
    config = case.config
    inputs = inputs_of(config, (14, 9))
    segments = np.array([[1] * 5 + [2] * 1 + [3] * 8, [1] * 2 + [2] * 7 + [0] * 5])
    expected, _ = encoder_of(config)(params(config), inputs, segments)
    too_many = segments * 100
    with as_on_tpu():
        found, _ = encoder_of(config)(params(config), inputs, segments)
        beyond, _ = encoder_of(config)(params(config), inputs, too_many)
    np.testing.assert_allclose(found[segments > 0], expected[segments > 0], atol=2e-5)
    assert np.isnan(beyond).any()


@pytest.mark.all
@each_case("tpu")
def test_bfloat16_is_close_to_float32(case):
    """Save for rows of which a layer takes other tokens."""
    config, inputs = case.config, inputs_of(case.config)
    expected, exact = encoder_of(config)(params(config), inputs)
    with as_on_tpu():
        found, rounded = encoder_of(in_bfloat16(config))(params(config), inputs)
    real = tokens_of_equal_choices(exact, rounded)
    assert 1e-4 < relative_error(found[real], expected[real]) < 0.03


@pytest.mark.parametrize("attention", ["k_to_k", pytest.param("k_to_all", marks=pytest.mark.all)])
def test_long_recordings_with_the_published_distances_are_the_same(attention, rng):
    """Packed, with gaps in and behind the segments; most keys are farther than a vector's reach."""
    config = TINY_SPEECH.replace(
        methods=(Coda(2.0, attention=attention, max_segments=2),),
        num_encoder_layers=1,
        max_left_distance=64,
        max_right_distance=8,
    )
    frames = random_frames(rng, [300, 220], 300).copy()
    frames[0, 40:60] = 0
    segments = np.repeat([[1, 2], [1, 1]], 150, axis=1)
    for given in (None, np.where(frames[..., 0] > 0, segments, 0)):
        expected, _ = encoder_of(config)(params(config), frames, given)
        with as_on_tpu():
            found, _ = encoder_of(config)(params(config), frames, given)
        real = frames[..., 0] > 0
        np.testing.assert_allclose(found[real], expected[real], atol=2e-5)


@each_case("tpu")
def test_gradients_are_the_same(case):
    config, batch = case.config, batch_of(case.config)

    def gradients():
        return jax.jit(jax.grad(lambda p: model_for(config).loss(p, batch)[0]))(params(config))

    expected = gradients()
    with as_on_tpu():
        found = gradients()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))
