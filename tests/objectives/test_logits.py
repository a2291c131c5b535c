"""What options do to logits, row by row, beside their definitions in plain Python."""

import functools

import jax
import numpy as np
import pytest

from coda_jax.objectives import Generation, logits

ROWS, PLACES, VOCAB = 6, 9, 7


@pytest.fixture(name="case")
def fixture_case(rng):
    """Logits [R, V], tokens [R, T]; where they are in use, they repeat each other."""
    return rng.normal(size=(ROWS, VOCAB)).astype(np.float32), rng.integers(0, 4, (ROWS, PLACES))


@pytest.mark.parametrize("length", [1, 4, PLACES])
def test_the_repetition_penalty_is_of_the_tokens_in_use(case, length):
    values, tokens = case
    found = jax.jit(logits.repetition_penalty)(values, tokens, length, 1.5)
    for row, seen, old in zip(found, tokens[:, :length], values, strict=True):
        for token, value in enumerate(old):
            penalised = value * 1.5 if value < 0 else value / 1.5
            assert row[token] == pytest.approx(penalised if token in seen else value, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, PLACES + 1])
def test_no_token_completes_an_n_gram_again(case, size):
    values, tokens = case
    function = jax.jit(functools.partial(logits.no_repeat_ngrams, size=size))
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


def test_top_k_keeps_ties_and_top_p_keeps_at_least_one():
    row = np.log(np.array([[0.1, 0.4, 0.1, 0.3, 0.1]], np.float32))
    kept = np.isfinite(logits.top_k(row, 3))
    assert kept.all()  # three are the least of the three greatest
    assert np.isfinite(logits.top_k(row, 2)).tolist() == [[False, True, False, True, False]]
    assert np.isfinite(logits.top_k(row, 99)).all()
    for p, count in ((0.0, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.99, 5)):
        found = np.asarray(logits.top_p(row, p))
        assert np.isfinite(found).sum() == count
        np.testing.assert_array_equal(found[np.isfinite(found)], row[np.isfinite(found)])


def test_what_is_not_asked_for_leaves_nothing_in_the_program(case):
    values, tokens = case

    def process(values, length, options):
        options = options.resolved()
        found = logits.processed(values, tokens, length, options, num_given=1, eos_id=1)
        return logits.warped(found, options) if options.do_sample else found

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
