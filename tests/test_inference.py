"""Prediction in buckets: the answers of the plain search, few programs, order kept."""

import dataclasses

from helpers import config, random_params
import jax
import numpy as np
import pytest

from coda_jax.inference import Decoding, Predictor
from coda_jax.objectives import model_for

CONFIG = config(coda={"reduction": 2.0}, num_encoder_layers=1)
SMALL = config(num_encoder_layers=1, num_decoder_layers=1)


def inputs(rng, lengths):
    """Random token arrays of these lengths."""
    return [rng.integers(2, 20, length) for length in lengths]


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
    assert predictor.cuts()[0] == (
        "1 of 1 inputs were longer than 32 tokens and were cut: "
        "--gin.Decoding.max_input_length=50 keeps all"
    )
    (short,) = dict(predictor([text[:32]])).values()
    np.testing.assert_array_equal(cut, short)
    assert predictor.num_truncated == 1
    (ended,) = dict(predictor([np.append(text, CONFIG.eos_id)])).values()
    (short,) = dict(predictor([np.append(text[:31], CONFIG.eos_id)])).values()
    np.testing.assert_array_equal(ended, short)


def test_outputs_that_reach_the_limit_without_an_end_are_counted(rng):
    cfg, params = SMALL.replace(eos_id=11), random_params(SMALL, seed=2)
    texts = inputs(rng, [3, 7, 5, 9, 2, 8])
    drawn = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    predictor = Predictor(cfg, params, Decoding(max_decode_length=5, batch_size=4, **drawn))
    cut = sum(11 not in tokens for _, tokens in predictor(texts))
    assert 0 < cut < 6 and predictor.num_cut == cut
    assert predictor.cuts() == [
        f"{cut} of 6 outputs were cut at 5 tokens: --gin.Decoding.max_decode_length=10 leaves them "
        "more"
    ]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.array([4, 20]), "input 8: its inputs have the id 20, the model's are 0 to 19"),
        (np.array([4.0, 5.0]), "input 8: its inputs are float64 values"),
        (np.array([], int), "input 8: its inputs are empty"),
    ],
)
def test_inputs_that_are_none_of_the_model_are_refused_by_number(values, named):
    predictor = Predictor(SMALL, random_params(SMALL), Decoding())
    with pytest.raises(ValueError, match=named):
        next(predictor([np.array([3]), values], first=6))
    with pytest.raises(ValueError, match=named):
        next(predictor.stream(values, 7))


@pytest.mark.parametrize(
    "name", ["max_input_length", "max_decode_length", "num_beams", "batch_size"]
)
def test_lengths_of_zero_are_refused(name):
    with pytest.raises(ValueError, match=rf"Decoding\.{name} must be at least 1, got 0"):
        Decoding(**{name: 0})


def test_all_candidates_come_with_their_scores(rng):
    params = random_params(SMALL)
    decoding = {"max_decode_length": 5, "num_beams": 3, "length_penalty": 1.0, "batch_size": 4}
    texts = inputs(rng, [3, 7, 5])
    predictor = Predictor(SMALL, params, Decoding(**decoding, num_return_sequences=2))
    best = dict(predictor(texts))
    for index, tokens, scores in predictor.candidates(texts):
        assert tokens.shape == (2, 5) and scores.shape == (2,) and scores[0] >= scores[1]
        np.testing.assert_array_equal(tokens[0], best[index])
        assert (tokens[0] != tokens[1]).any()


def test_draws_do_not_depend_on_the_order_and_the_batch(rng):
    params = random_params(SMALL)
    texts = inputs(rng, [9, 3, 12, 5, 7])
    decoding = Decoding(max_decode_length=6, do_sample=True, batch_size=2, seed=5)
    predictor = Predictor(SMALL, params, decoding)
    together = dict(predictor(texts))
    later = dict(predictor(texts[2:], first=2))
    for index, tokens in later.items():
        np.testing.assert_array_equal(tokens, together[index + 2])
    others = dict(predictor(texts, first=9))
    assert any((others[index] != tokens).any() for index, tokens in together.items())


STREAMS = {
    "greedy": {"decoder_prefix": (4, 9), "no_repeat_ngram_size": 1},
    "sampling": {"do_sample": True, "temperature": 1.5, "seed": 3},
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.all] * (i > 0)) for i, x in enumerate(STREAMS)]
)
def test_a_stream_gives_the_tokens_of_the_answer_as_they_come(rng, name):
    cfg, params = SMALL.replace(eos_id=11), random_params(SMALL, seed=2)
    texts = inputs(rng, [3, 7, 5, 9, 2, 8])
    decoding = Decoding(max_decode_length=9, batch_size=2, max_input_length=8, **STREAMS[name])
    predictor = Predictor(cfg, params, decoding)
    answers = dict(predictor(texts))
    assert predictor.num_truncated == 1
    lengths = set()
    for number, text in enumerate(texts):
        stream = predictor.stream(text, number)
        first = next(stream)  # before the others are known
        tokens = [first, *stream]
        assert tokens == answers[number][: len(tokens)].tolist()
        assert not (answers[number][len(tokens) :] != cfg.pad_id).any()
        lengths.add(len(tokens))
    assert predictor.num_truncated == 2
    assert len(lengths) > 1  # some end


def test_beams_are_not_streamed(rng):
    predictor = Predictor(SMALL, random_params(SMALL), Decoding(num_beams=2))
    with pytest.raises(ValueError, match="without beams, got num_beams=2"):
        predictor.stream(*inputs(rng, [3]))


class Letters:
    """A vocabulary whose tokens are letters, from 2 on."""

    def pieces(self):
        return [b"", b"", *(bytes([letter]) for letter in range(97, 115))]


@pytest.mark.parametrize("options", [{}, pytest.param({"num_beams": 2}, marks=pytest.mark.all)])
def test_an_output_ends_with_the_token_that_completes_a_stop_text(rng, options):
    """Greedily it is the answer without stop texts, cut."""
    params = random_params(SMALL, seed=4)
    texts = inputs(rng, [3, 7, 5, 9, 2, 8])
    decoding = Decoding(max_decode_length=12, batch_size=6, **options)
    free = dict(Predictor(SMALL, params, decoding)(texts))
    letters = b"".join(Letters().pieces()[token] for token in free[0]).decode()
    decoding = dataclasses.replace(decoding, stop_strings=(letters[3:5], "zz"))
    stopped = dict(Predictor(SMALL, params, decoding, Letters())(texts))
    ended = 0
    for index, tokens in stopped.items():
        found = b"".join(Letters().pieces()[token] for token in tokens).decode()
        length = found.find(letters[3:5]) + 2
        if length > 1:
            ended += 1
            assert not tokens[length:].any()
        if not options:
            expected = free[index][: length if length > 1 else None]
            np.testing.assert_array_equal(tokens[: len(expected)], expected)
    assert ended
    with pytest.raises(ValueError, match="need a vocabulary"):
        Predictor(SMALL, params, decoding)
