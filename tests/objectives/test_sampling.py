"""Sampling: the distribution that the logits say, and draws that depend on nothing else."""

import functools

from helpers import config, logits, random_params, random_tokens
import jax
import numpy as np
import pytest
from scipy import stats

from coda_jax.objectives import Generation, model_for

COUNT = 100_000
CONFIG = config(vocab_size=8, num_encoder_layers=1, num_decoder_layers=1)
PARAMS = random_params(CONFIG, seed=1)


@functools.partial(jax.jit, static_argnums=2)
def generate(params, inputs, options, **arguments):
    """Returns tokens [B, n, L] and scores [B, n]."""
    return model_for(CONFIG).generate(params, inputs, options, **arguments)


def warped(row, temperature, top_k, top_p):
    """The probabilities [V] of a draw from one row of logits, by the definitions."""
    row = np.asarray(row, np.float64) / temperature
    kept = np.argsort(-row)[: top_k or len(row)]
    probabilities = np.exp(row[kept] - row[kept].max())
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities  # of all that are more probable
    probabilities *= before < top_p
    made = np.zeros(len(row))
    made[kept] = probabilities / probabilities.sum()
    return made


def two_tokens(inputs, **options):
    """Returns {(first, second): probability}; padding follows the end token."""
    vocab = np.arange(CONFIG.vocab_size, dtype=np.int32)
    decoder_inputs = np.stack([np.full_like(vocab, CONFIG.decoder_start_id), vocab], axis=1)
    rows = np.repeat(inputs, len(vocab), axis=0)
    found = logits(CONFIG, PARAMS, rows, decoder_inputs, np.ones_like(decoder_inputs))
    table = {}
    for first, p in enumerate(warped(found[0, 0], **options)):
        if first == CONFIG.eos_id:
            table[first, CONFIG.pad_id] = p
            continue
        for second, q in enumerate(warped(found[first, 1], **options)):
            table[first, second] = p * q
    return table


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"temperature": 1.0, "top_k": 0, "top_p": 1.0}, id="all"),
        pytest.param(
            {"temperature": 1.5, "top_k": 6, "top_p": 0.8}, id="temperature, top-k, top-p"
        ),
    ],
)
@pytest.mark.all
def test_draws_have_the_distribution_of_the_logits(options, rng):
    """A chi-square test of 100,000 draws of two tokens, from one encoding."""
    inputs = random_tokens(rng, [5], 6, CONFIG.vocab_size)
    asked = Generation(
        max_decode_length=2, do_sample=True, num_return_sequences=COUNT, seed=3, **options
    )
    tokens = np.asarray(generate(PARAMS, inputs, asked)[0][0])
    table = two_tokens(inputs, **options)
    pairs, counts = np.unique(tokens, axis=0, return_counts=True)
    found = {tuple(pair): count for pair, count in zip(pairs.tolist(), counts, strict=True)}
    assert sum(table.values()) == pytest.approx(1)
    assert all(table[pair] > 0 for pair in found)  # what is cut off is never drawn
    likely = {pair: p for pair, p in table.items() if p * COUNT >= 5}
    expected = np.array([p * COUNT for p in likely.values()])
    seen = np.array([found.get(pair, 0) for pair in likely])
    rest = COUNT - expected.sum()
    if rest > 0.5:
        expected, seen = np.append(expected, rest), np.append(seen, COUNT - seen.sum())
    assert len(expected) > 10
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 0.001


def test_a_draw_depends_on_seed_and_number_and_not_on_its_place(rng):
    inputs = random_tokens(rng, [5, 3, 6, 1, 4, 2], 6, CONFIG.vocab_size)
    options = Generation(max_decode_length=6, do_sample=True)

    def draw(inputs, numbers, seed=11):
        numbers = np.array(numbers, np.uint32)
        return generate(PARAMS, inputs, options, numbers=numbers, seed=np.uint32(seed))[0]

    together, order = draw(inputs, range(6)), np.array([3, 1, 5, 0, 4, 2])
    np.testing.assert_array_equal(together[order], draw(inputs[order], order))
    assert (draw(inputs, range(6), seed=12) != together).any()
    same = np.tile(inputs[:1], (6, 1))
    assert len(np.unique(draw(same, range(6)), axis=0)) > 3
    assert len(np.unique(draw(same, [7] * 6), axis=0)) == 1


@pytest.mark.all
def test_samples_of_an_input_are_the_same_however_many_are_drawn(rng):
    """They come by their scores, which are sums of the model's own log-probabilities."""
    inputs = random_tokens(rng, [5, 3], 6, CONFIG.vocab_size)
    options = {"max_decode_length": 4, "do_sample": True, "temperature": 2.0, "min_new_tokens": 4}
    few, _ = generate(PARAMS, inputs, Generation(**options))
    tokens, scores = generate(PARAMS, inputs, Generation(**options, num_return_sequences=5))
    assert (np.diff(scores, axis=1) <= 0).all()
    for first, rows in zip(few[:, 0].tolist(), tokens.tolist(), strict=True):
        assert first in rows and len({tuple(row) for row in rows}) > 1
    flat = np.asarray(tokens).reshape(-1, 4)
    shifted = np.pad(flat, ((0, 0), (1, 0)), constant_values=CONFIG.decoder_start_id)[:, :-1]
    rows = np.repeat(inputs, 5, axis=0)
    found = jax.nn.log_softmax(logits(CONFIG, PARAMS, rows, shifted, np.ones_like(flat)))
    total = np.take_along_axis(np.asarray(found), flat[..., None], axis=2).sum((1, 2))
    np.testing.assert_allclose(scores.reshape(-1), total, atol=1e-4)
