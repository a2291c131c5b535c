"""What options do to logits, row by row, beside their definitions in plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.objectives import Generation, logits_processors
from coda_jax.objectives.logits_processors import top_k, top_p

ROWS, PLACES, VOCAB = 6, 9, 7


@pytest.fixture(name="case")
def fixture_case(rng):
    """Logits [R, V], tokens [R, T]; where they are in use, they repeat each other."""
    return rng.normal(size=(ROWS, VOCAB)).astype(np.float32), rng.integers(0, 4, (ROWS, PLACES))


@pytest.mark.parametrize("length", [1, 4, PLACES])
def test_the_repetition_penalty_is_of_the_tokens_in_use(case, length):
    values, tokens = case
    found = jax.jit(logits_processors.repetition_penalty)(values, tokens, length, 1.5)
    for row, seen, old in zip(found, tokens[:, :length], values, strict=True):
        for token, value in enumerate(old):
            penalised = value * 1.5 if value < 0 else value / 1.5
            assert row[token] == pytest.approx(penalised if token in seen else value, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, PLACES + 1])
def test_no_token_completes_an_n_gram_again(case, size):
    values, tokens = case
    function = jax.jit(functools.partial(logits_processors.no_repeat_ngrams, size=size))
    banned_anything = False
    for length in range(1, PLACES + 1):
        found = np.asarray(function(values, tokens, length))
        for row, old, used in zip(found, values, tokens[:, :length].tolist(), strict=True):
            grams = {tuple(used[i : i + size]) for i in range(length - size + 1)}
            last = used[length - size + 1 :] if size <= length else None
            banned = [last is not None and (*last, token) in grams for token in range(VOCAB)]
            np.testing.assert_array_equal(row, np.where(banned, -np.inf, old))
            banned_anything |= any(banned)
    assert banned_anything == (size <= PLACES)


def kept(function, probabilities, value):
    """Returns which tokens a cut leaves; those keep their logits."""
    row = jnp.log(jnp.array([probabilities], jnp.float32))
    found = function(row, value)
    chosen = jnp.isfinite(found)
    np.testing.assert_array_equal(found, jnp.where(chosen, row, -jnp.inf))
    return np.flatnonzero(chosen[0]).tolist()


def test_the_most_probable_tokens_are_left_and_all_that_tie_with_the_least():
    probabilities = [0.1, 0.4, 0.05, 0.3, 0.15]
    for k, expected in ((1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (5, [*range(5)]), (9, None)):
        assert kept(top_k, probabilities, k) == (expected or [*range(5)])
    for p, count in ((0.0, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.94, 4), (0.999, 5)):
        assert len(kept(top_p, probabilities, p)) == count
    ties = [0.1, 0.4, 0.1, 0.3, 0.1]
    assert kept(top_k, ties, 3) == kept(top_p, ties, 0.75) == [*range(5)]
    forbidden = [0.0, 0.6, 0.4]
    assert kept(top_k, forbidden, 3) == kept(top_p, forbidden, 0.99) == [1, 2]


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_a_cut_is_where_a_sort_puts_it(scale, rng):
    values = jnp.asarray(rng.normal(size=(40, 37)) * scale, jnp.float32)
    descending = jnp.sort(values)[:, ::-1]
    found = jax.jit(functools.partial(top_k, k=13))(values)
    expected = jnp.where(values < descending[:, 12, None], -jnp.inf, values)
    np.testing.assert_array_equal(found, expected)
    ascending = jnp.cumsum(jax.nn.softmax(descending[:, ::-1]), axis=1)  # as in transformers
    counts = jnp.isfinite(jax.jit(functools.partial(top_p, p=0.6))(values)).sum(1)
    np.testing.assert_array_equal(counts, jnp.maximum(1, (ascending > 1 - 0.6).sum(1)))


def test_what_is_not_asked_for_leaves_nothing_in_the_program(case):
    values, tokens = case

    def process(values, length, options):
        options = options.resolved()
        found = logits_processors.processed(values, tokens, length, options, num_given=1, eos_id=1)
        return logits_processors.warped(found, options) if options.do_sample else found

    def operations(**options):
        options = Generation(**options)
        return len(jax.make_jaxpr(lambda v, n: process(v, n, options))(values, 3).eqns)

    assert operations() == 0
    assert operations(do_sample=True, top_k=0) == 0
    for asked in (
        {"repetition_penalty": 2.0},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 1},
        {"forced_bos_token_id": 1},
        {"do_sample": True, "temperature": 2.0, "top_k": 0},
        {"do_sample": True},
        {"do_sample": True, "top_k": 0, "top_p": 0.5},
    ):
        assert operations(**asked) > 0
