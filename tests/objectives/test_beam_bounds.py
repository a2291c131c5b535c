"""A beam search ends when nothing can improve it, and not before: against one that never ends."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.objectives import Generation, beams

EOS, VOCAB, BEAMS, LENGTH = 1, 4, 2, 12
CONFIG = types.SimpleNamespace(eos_id=EOS, pad_id=0, decoder_start_id=0, vocab_size=VOCAB)


class Table:
    """A decoder whose logits [B, L, V, V] depend on the place and the previous token."""

    config = CONFIG

    def input_mask(self, tokens):
        return tokens > 0

    def apply(self, variables, *args, method, **kwargs):
        if method == "encode":
            return args[0]
        tokens, tables = args[2], variables["params"]
        place = variables.get("cache", {"place": jnp.int32(0)})["place"]
        example = jnp.arange(len(tokens)) // (len(tokens) // len(tables))
        logits = tables[example, place, tokens[:, 0]]
        return logits[:, None], {"cache": {"place": place + ("cache" in variables)}}


@functools.partial(jax.jit, static_argnames=("max_decode_length",))
def search(tables, alpha, max_decode_length=LENGTH, **options):
    """Returns the best tokens [B, L] and their scores [B]."""
    options = Generation(
        num_beams=BEAMS, alpha=alpha, max_decode_length=max_decode_length, **options
    ).resolved()
    start = jnp.zeros((len(tables) * BEAMS, 1), jnp.int32)
    inputs = jnp.ones((len(tables), 1), jnp.int32)
    tokens, scores = beams.beam_search(Table(), tables, inputs, start, options)
    return tokens[:, 0], scores[:, 0]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def endless(table, alpha, length=LENGTH):
    """The best (score, tokens) of a search by T5X's rules that goes on to the last place."""
    table = log_softmax(table.astype(np.float64))
    live, finished = [(0.0, ())], []
    for place in range(length):
        every = [
            (total + table[place, tokens[-1] if tokens else 0, token], (*tokens, token))
            for total, tokens in live
            for token in range(VOCAB)
        ]
        best = sorted(every, reverse=True)[: 2 * BEAMS]
        finished += [
            (total / ((5 + place + 1) / 6) ** alpha, tokens)
            for total, tokens in best
            if tokens[-1] == EOS
        ]
        live = [beam for beam in best if beam[1][-1] != EOS][:BEAMS]
    return max(finished or live)


def random_tables(count, seed=0):
    """Logits at which an end becomes likely sooner or later, most often after some places."""
    rng = np.random.default_rng(seed)
    tables = rng.normal(size=(count, LENGTH, VOCAB, VOCAB)).astype(np.float32)
    ends = rng.integers(0, LENGTH, (count, 1, 1))
    strength = rng.uniform(-4, 6, (count, 2, 1))
    late = np.arange(LENGTH)[None, :, None] >= ends
    tables[..., EOS] += np.where(late, strength[:, 1:], strength[:, :1])
    return tables


ALPHAS = [-2.0, -1.0, 0.0, 0.6, *(pytest.param(x, marks=pytest.mark.all) for x in (-10, -4, 2, 10))]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_nothing_better_is_missed_whatever_alpha_is(alpha):
    tables = random_tables(300)
    tokens, scores = map(np.asarray, search(tables, jnp.float32(alpha)))
    for table, row, score in zip(tables, tokens, scores, strict=True):
        expected, best = endless(table, alpha)
        np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-5)
        assert tuple(row[: len(best)]) == best and not row[len(best) :].any()


def test_with_a_negative_alpha_the_next_length_is_the_best_there_may_be():
    ending = np.array([0.1, 0.1, *[1 - 1e-6] * 62])
    table = np.full((1, 64, VOCAB, VOCAB), -30, np.float32)
    table[0, :, :, EOS], table[0, :, :, 2] = np.log(ending)[:, None], np.log(1 - ending)[:, None]
    tokens, scores = search(table, jnp.float32(-2), max_decode_length=64)
    assert tokens[0, :4].tolist() == [2, 2, EOS, 0]
    np.testing.assert_allclose(scores, [2 * np.log(0.9) * (8 / 6) ** 2], rtol=1e-3)  # -0.375
