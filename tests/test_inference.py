"""Prediction in buckets: the answers of the plain search, few programs, order kept."""

import dataclasses

from helpers import TINY_SPEECH, config, logits, random_params
import jax
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.commands import evaluate
from coda_jax.commands.loading import LoadedModel
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.inference import Decoding, Encodings, Predictor
from coda_jax.objectives import NOT_FINITE, model_for
from coda_jax.objectives.beams import NO_OUTPUT
from coda_jax.sharding import Placement

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
        (
            np.array([4, 20]),
            "input 7 .*: its inputs have the id 20, the model's are 0 to 19",
        ),
        (np.array([4.0, 5.0]), "input 7 .*: its inputs are float64 values"),
        (np.array([], int), "input 7 .*: its inputs are empty"),
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
    with pytest.raises(ValueError, match=rf"Decoding\.{name} must be .* at least 1, got 0"):
        Decoding(**{name: 0})


def test_all_candidates_come_with_their_scores(rng):
    params = random_params(SMALL)
    decoding = {"max_decode_length": 5, "num_beams": 3, "length_penalty": 1.0, "batch_size": 4}
    texts = inputs(rng, [3, 7, 5])
    predictor = Predictor(SMALL, params, Decoding(**decoding, num_return_sequences=2))
    best = dict(predictor(texts))
    for index, tokens, scores in predictor.candidates(texts):
        assert tokens.shape == (2, 5) and scores.shape == (2,)
        np.testing.assert_array_equal(tokens[0], best[index])
        assert (tokens[0] != tokens[1]).any()


def log_probability(cfg, params, text, tokens, given=0):
    """What the model gives an output [n] behind what was given, when it is fed with it."""
    padded, fed = np.full((1, 16), cfg.pad_id), np.full((1, 8), 2)  # one shape for all
    padded[0, : len(text)], fed[0, : len(tokens)] = text, [cfg.decoder_start_id, *tokens[:-1]]
    found = np.asarray(logits(cfg, params, padded, fed, np.ones_like(fed))[0], np.float64)
    chosen = found[np.arange(len(tokens)), tokens] - np.log(np.exp(found[: len(tokens)]).sum(-1))
    return chosen[given:].sum()


BEAMS = {"num_beams": 3, "num_return_sequences": 3}
SEARCHES = {
    "greedy": {},
    "greedy behind a prefix": {"decoder_prefix": (4, 9)},
    "beams of T5X": {**BEAMS, "decoder_prefix": (4, 9)},
    "beams of transformers": {**BEAMS, "max_decode_length": 4, "length_penalty": 2.0},
    "beams that stop": {**BEAMS, "max_decode_length": 3, "stop_strings": ("\x02", "\n")},
}


@pytest.mark.parametrize(
    "search",
    [name if "T5X" in name else pytest.param(name, marks=pytest.mark.all) for name in SEARCHES],
)
def test_scores_are_the_log_probabilities_of_outputs(rng, search):
    cfg, options = SMALL.replace(eos_id=18), SEARCHES[search]
    params, texts = random_params(cfg, seed=5), inputs(rng, [3, 7, 5, 9, 2, 8])
    stops = [5, 13] if "stop_strings" in options else []  # the ids of these bytes
    decoding = Decoding(**{"max_decode_length": 6, "batch_size": 8, **options})
    predictor = Predictor(cfg, params, decoding, ByteVocabulary())
    given, ends = len(options.get("decoder_prefix", ())), []
    for index, outputs, scores in predictor.candidates(texts):
        found = scores > NO_OUTPUT
        for tokens, score in zip(outputs[found], scores[found], strict=True):
            places = [i + 1 for i, token in enumerate(tokens) if token in (18, *stops)]
            ends.append(places[0] if places else None)
            expected = log_probability(cfg, params, texts[index], tokens[: ends[-1]], given)
            assert score == pytest.approx(expected, abs=1e-5)
    assert len({*ends}) > 1 and {None, decoding.max_decode_length} & {*ends}, ends


@pytest.mark.parametrize(("devices", "sizes"), [(1, [8, 8, 1, 2, 4, 8]), (2, [8, 8, 2, 2, 4, 8])])
def test_a_list_that_is_shorter_than_a_batch_takes_a_smaller_one(rng, devices, sizes):
    placement = Placement(devices=jax.devices()[:devices])
    decoding = Decoding(max_decode_length=3, batch_size=8)
    predictor = Predictor(SMALL, random_params(SMALL), decoding, placement=placement)
    found = []

    def answered(params, batch):
        found.append(len(batch))
        return np.repeat(batch[:, :1], 3, axis=1)[:, None], np.zeros((len(batch), 1))

    predictor._generate = answered
    texts = inputs(rng, [9, 3, 12, 5, 7, 4, 8, 6, 2, 11])
    for count in (10, 1, 2, 3, 7):
        answers = dict(predictor(texts[:count]))
        assert [answers[i][0] for i in range(count)] == [text[0] for text in texts[:count]]
    assert found == sizes


@pytest.mark.all
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


@pytest.mark.all
@pytest.mark.parametrize("name", STREAMS)
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


# --- Logits that are not finite ---


def broken(params, token):
    """The parameters, with an embedding that is NaN: of inputs with that token nothing is left."""
    flat = trees.flatten(params)
    flat["token_embedder/embedding"] = np.array(flat["token_embedder/embedding"])
    flat["token_embedder/embedding"][token] = np.nan
    return trees.unflatten(flat)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "transformers' beams": {"num_beams": 2, "length_penalty": 1.0, "num_return_sequences": 2},
    "drawn": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_an_input_whose_logits_are_not_finite_has_no_answer(rng, options):
    decoding = Decoding(max_input_length=32, max_decode_length=4, batch_size=4, **options)
    texts = [text % 17 + 2 for text in inputs(rng, [3, 9, 7, 5])]
    texts[2][1] = 19
    params = random_params(SMALL)
    batch = np.zeros((4, 9), np.int32)
    for row, text in zip(batch, texts, strict=True):
        row[: len(text)] = text

    @jax.jit
    def generate(params):
        return model_for(SMALL).generate(params, batch, decoding)

    whole, scores = generate(params)
    found, marks = generate(broken(params, 19))
    decoder_is_whole = ~(np.asarray(whole) == 19).any((1, 2))
    assert np.isfinite(scores).all() and decoder_is_whole[[0, 1, 3]].any()
    assert (found[2] == NOT_FINITE).all() and np.isnan(marks[2]).all()
    for row in (0, 1, 3):
        if decoder_is_whole[row] and not np.isnan(marks[row]).any():
            np.testing.assert_array_equal(found[row], whole[row])


@pytest.mark.all
def test_an_input_whose_logits_are_not_finite_is_named():
    decoding = Decoding(max_decode_length=4, batch_size=2)
    predictor = Predictor(SMALL, broken(random_params(SMALL), 19), decoding)
    named = r"no answer to input 5 .*1 parameters .*token_embedder/embedding"
    text = np.array([3, 19, 1])
    with pytest.raises(FloatingPointError, match=named):
        list(predictor.stream(text, number=5))
    with pytest.raises(FloatingPointError, match=named):
        list(predictor([np.array([3, 1]), text], first=4))


def test_one_infinite_logit_is_enough():
    """Of a token that would not have been chosen."""
    params = trees.flatten(random_params(SMALL))
    kernel = np.array(params["decoder/logits_dense/kernel"])
    kernel[:, 7] = 3e38
    params = trees.unflatten(params | {"decoder/logits_dense/kernel": kernel})
    decoding = Decoding(max_decode_length=3, batch_size=2)
    with pytest.raises(FloatingPointError, match="values leave the range of float32"):
        list(Predictor(SMALL, params, decoding)([np.array([3, 1])]))


def test_a_transcript_of_frames_that_are_not_finite_is_none(rng):
    cfg = TINY_SPEECH.replace(num_encoder_layers=1)
    params, decoding = random_params(cfg), Decoding(max_decode_length=3, batch_size=2)
    frames = [rng.normal(size=(5, 7)).astype(np.float32) for _ in range(3)]
    for frame in frames:
        frame[:, 0] = 1
    frames[1][3, 2] = np.inf
    for beams in (1, 2):
        options = dataclasses.replace(decoding, num_beams=beams)
        with pytest.raises(ValueError, match=r"input 1 .*its inputs hold values"):
            list(Predictor(cfg, params, options)(frames))


@pytest.mark.parametrize("embed", ["mean", "tokens", None])
def test_encodings_that_are_not_finite_are_none(embed):
    head = {"head": "classification", "labels": ("a", "b")}
    cfg = SMALL.encoder_only().replace(**(head if embed is None else {}))
    encodings = Encodings(cfg, broken(random_params(cfg), 19), Decoding(batch_size=2), embed)
    with pytest.raises(FloatingPointError, match="no answer to input 8"):
        list(encodings([np.array([3, 1]), np.array([19, 1])], first=7))


def test_metrics_of_a_head_that_are_not_finite_name_the_input():
    cfg = SMALL.encoder_only().replace(head="classification", labels=("a", "b"))
    texts = ([3, 1], [4, 1], [5, 1], [19, 1])

    class Examples:
        """Four texts."""

        task = "task"

        def check(self, expected):
            """As of `Data`."""

        def chosen(self, expected):
            """As of `Data`."""
            return [{"inputs": np.array(text), "targets": np.array([0])} for text in texts]

    model = LoadedModel(cfg, broken(random_params(cfg), 19), None)
    with pytest.raises(FloatingPointError, match="no answer to input 3 "):
        evaluate._of_head(model, Examples(), Decoding(batch_size=2), None, None)


def test_a_batch_that_the_devices_cannot_share_is_refused_before_any_input():
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of the 2 devices"):
        Predictor(SMALL, random_params(SMALL), Decoding(batch_size=3))
