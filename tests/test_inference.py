"""Prediction in buckets: the answers of the plain search, few programs, order kept."""

from helpers import config, random_params
import jax
import numpy as np
import pytest

from coda_jax.inference import Decoding, Predictor, bucket
from coda_jax.objectives import model_for

CONFIG = config(coda={"reduction": 2.0}, num_encoder_layers=1)


def inputs(rng, lengths):
    """Random token arrays of these lengths."""
    return [rng.integers(2, 20, length) for length in lengths]


def test_buckets_are_powers_of_two_up_to_the_longest():
    assert [bucket(n, 100) for n in (0, 1, 32, 33, 64, 65, 100, 500)] == [
        *(32, 32, 32, 64, 64, 100, 100, 100)
    ]


@pytest.mark.parametrize("num_beams", [1, pytest.param(2, marks=pytest.mark.all)])
def test_answers_are_those_of_each_input_alone(rng, num_beams):
    model, params = model_for(CONFIG), random_params(CONFIG)
    decoding = Decoding(max_input_length=64, max_decode_length=5, num_beams=num_beams, batch_size=4)
    texts = inputs(rng, [3, 40, 7, 33, 64, 5, 6])
    predictor = Predictor(CONFIG, params, decoding)
    answers = dict(predictor(texts))
    assert sorted(answers) == list(range(len(texts)))
    assert predictor.num_programs == 2  # the buckets of 32 and of 64
    alone = jax.jit(
        lambda tokens: model.predict(params, tokens, max_decode_length=5, num_beams=num_beams)
    )
    for index in (0, 1):  # one of each bucket
        np.testing.assert_array_equal(answers[index], alone(texts[index][None])[0])


def test_long_inputs_are_cut_and_counted(rng):
    params = random_params(CONFIG)
    decoding = Decoding(max_input_length=32, max_decode_length=3, batch_size=2)
    predictor = Predictor(CONFIG, params, decoding)
    (text,) = inputs(rng, [50])
    (cut,) = dict(predictor([text])).values()
    assert predictor.num_truncated == 1
    (short,) = dict(predictor([text[:32]])).values()
    np.testing.assert_array_equal(cut, short)
    assert predictor.num_truncated == 1


@pytest.mark.parametrize(
    "name", ["max_input_length", "max_decode_length", "num_beams", "batch_size"]
)
def test_lengths_of_zero_are_refused(name):
    with pytest.raises(ValueError, match=rf"Decoding\.{name} must be at least 1, got 0"):
        Decoding(**{name: 0})
