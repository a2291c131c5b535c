"""Generation equals transformers' under every option, and refuses options that contradict."""

import dataclasses
import functools
import importlib.util
import json
import random

from helpers import GOLDEN, TINY_SPEECH, config, random_params
import jax
import numpy as np
import pytest

from coda_jax import checkpoints
from coda_jax.data.stop_texts import stop_table
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.objectives import CTC, Generation, Seq2Seq, model_for

FOLDER = GOLDEN / "generation"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
IDS, LENGTH = EXPECTED["ids"], EXPECTED["max_decode_length"]
INPUTS = np.array(EXPECTED["inputs"], np.int32)
CASES = {case["case"]: case for case in EXPECTED["cases"]}


@functools.partial(jax.jit, static_argnums=(0, 3))
def generate(cfg, params, inputs, options, length_penalty=None, **arguments):
    """Returns tokens [B, n, L] and scores [B, n]; one program serves all length penalties."""
    if length_penalty is not None:
        options = dataclasses.replace(options, length_penalty=length_penalty)
    return model_for(cfg).generate(params, inputs, options, **arguments)


@functools.cache
def golden():
    """Returns the config and parameters of the golden checkpoint."""
    cfg, params = checkpoints.load_hf(FOLDER)
    return cfg.replace(**IDS), jax.tree.map(np.asarray, params)


def assert_outputs(found, expected, pad_id):
    """Tokens [B][n][<= L], equal and filled up with padding, and scores [B][n]."""
    for rows, expected_rows in zip(np.asarray(found[0]), expected[0], strict=True):
        for row, tokens in zip(rows, expected_rows, strict=True):
            assert row.tolist() == tokens + [pad_id] * (len(row) - len(tokens))
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.all] if i % 2 else []) for i, x in enumerate(CASES)],
)
def test_outputs_and_scores_are_those_of_transformers(name):
    case, (cfg, params) = CASES[name], golden()
    options = {"max_decode_length": LENGTH, **case["options"]}
    penalty = options.pop("length_penalty", None)
    found = generate(cfg, params, INPUTS, Generation(**options), penalty)
    assert_outputs(found, (case["tokens"], case["scores"]), cfg.pad_id)


def random_options(seed):
    """Returns options of search, many at once."""
    rng = random.Random(seed)
    options = {
        "no_repeat_ngram_size": rng.choice([0, 0, 1, 2, 3]),
        "repetition_penalty": rng.choice([1.0, 0.8, 1.5]),
        "min_new_tokens": rng.choice([0, 2, 7]),
    }
    start = rng.choice([{}, {"forced_bos_token_id": 6}, {"decoder_prefix": [4, 8, 4]}])
    beams = rng.choice([1, 2, 4])
    if beams > 1:
        options |= {
            "num_beams": beams,
            "num_return_sequences": rng.choice([1, beams]),
            "length_penalty": rng.choice([-0.5, 0.0, 0.7, 1.3]),
            "early_stopping": rng.choice([False, True, "never"]),
        }
    return options | start


@pytest.fixture(name="reference", scope="module")
def fixture_reference():
    """The module that made the golden files; skips where transformers 5 is missing."""
    pytest.importorskip("torch")
    if int(pytest.importorskip("transformers").__version__.split(".")[0]) < 5:
        pytest.skip("the beam search of transformers 4 is another one")
    path = GOLDEN / "make_golden_generation.py"
    spec = importlib.util.spec_from_file_location("make_golden_generation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(8))
def test_many_options_at_once_give_what_transformers_gives(seed, reference, tmp_path):
    """Live, with weights that `save_hf` wrote."""
    cfg = config(vocab_size=24, num_encoder_layers=1)
    params = random_params(cfg, seed)
    checkpoints.save_hf(tmp_path, cfg, params)
    options = random_options(seed)
    expected = reference.outputs(tmp_path, INPUTS, options)
    options = Generation(max_decode_length=LENGTH, **options)
    found = generate(cfg.replace(**IDS), params, INPUTS, options)
    assert_outputs(found, expected, IDS["pad_id"])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "length_penalty": 1.0, "num_return_sequences": 3}],
    ids=["greedy", "beams"],
)
def test_stop_texts_end_what_they_end_in_transformers(options, reference, tmp_path):
    """Live, with ByT5's tokens, of which two in a row are the stop text."""
    import transformers

    cfg = config(vocab_size=24, num_encoder_layers=1)
    params = random_params(cfg, seed=2)
    checkpoints.save_hf(tmp_path, cfg, params)
    free, _ = reference.outputs(tmp_path, INPUTS, options)
    pieces = ByteVocabulary().pieces()
    stop = next(b"".join(pieces[i] for i in row[2:4]) for rows in free for row in rows if row[4:])
    stop = [stop.decode(), "no such text"]
    more = {"stop_strings": stop, "tokenizer": transformers.ByT5Tokenizer()}
    expected, _ = reference.outputs(tmp_path, INPUTS, options, **more)
    assert expected != free
    table = stop_table(ByteVocabulary(), stop, cfg.vocab_size)
    options = Generation(max_decode_length=LENGTH, stop_strings=stop, **options)
    found, scores = generate(cfg.replace(**IDS), params, INPUTS, options, stops=table)
    assert_outputs((found, scores), (expected, scores), IDS["pad_id"])


def test_each_input_may_have_its_own_prefix():
    """The golden one is that of every other input."""
    (cfg, params), case = golden(), CASES["prefix"]
    prefix = np.tile(np.array([case["options"]["decoder_prefix"], [2, 6]], np.int32), (6, 1))
    options = Generation(max_decode_length=LENGTH)
    found, scores = generate(cfg, params, INPUTS, options, prefix=prefix)
    assert found[:, 0, :2].tolist() == prefix.tolist()
    expected = case["tokens"][::2], case["scores"][::2]
    assert_outputs((found[::2], scores[::2]), expected, cfg.pad_id)


def test_every_family_with_a_decoder_generates(rng):
    """Here speech; the contract tests take all families through `predict` and export."""
    cfg = TINY_SPEECH.replace(num_encoder_layers=1, num_decoder_layers=1, vocab_size=12)
    inputs = rng.normal(size=(2, *cfg.input_spec(1, 6).shape[1:])).astype(np.float32)
    inputs[..., 0] = 1
    options = Generation(max_decode_length=5, num_beams=3, length_penalty=1.0,
                         num_return_sequences=2, no_repeat_ngram_size=1)  # fmt: skip
    tokens, scores = generate(cfg, random_params(cfg), inputs, options)
    assert tokens.shape == (2, 2, 5) and (np.diff(scores, axis=1) <= 0).all()
    for row in tokens.reshape(-1, 5).tolist():
        row = row[: row.index(cfg.eos_id) + 1] if cfg.eos_id in row else row
        assert len(set(row)) == len(row)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_decode_length": 0}, "max_decode_length must be .* at least 1, got 0"),
        ({"num_beams": -3}, "num_beams must be .* at least 1, got -3"),
        ({"num_beams": 2.0}, "num_beams must be a whole number .*, got 2.0"),
        ({"temperature": 0.0}, "temperature must be .* at least 1e-06, got 0.0"),
        ({"temperature": "hot"}, "temperature must be a number .*, got 'hot'"),
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1, got 1.5"),
        ({"seed": 2**32}, "seed must be .* from 0 to 4294967295, got 4294967296"),
        ({"do_sample": 2}, "do_sample must be True or False, got 2"),
        ({"stop_strings": ["a", ""]}, r"stop_strings\[1\] must be a text that is not empty"),
        ({"early_stopping": "soon"}, r"must be one of \(False, True, 'never'\), got 'soon'"),
        ({"early_stopping": True, "num_beams": 2}, "give its length_penalty too, 1.0"),
        ({"alpha": 0.6, "length_penalty": 1.0}, "as transformers does: give one of them"),
        ({"do_sample": True, "num_beams": 2}, "num_beams=2 searches, do_sample=True draws"),
        ({"top_k": 5, "top_p": 0.9}, "top_k=5, top_p=0.9 needs do_sample=True"),
        ({"num_beams": 2, "num_return_sequences": 3}, "needs at least as many beams, got num_be"),
        ({"num_return_sequences": 2}, "got num_beams=1, or do_sample=True"),
        ({"max_decode_length": 4, "min_new_tokens": 5}, "is more than max_decode_length=4"),
        ({"max_decode_length": 2, "decoder_prefix": [5, 6]}, "none is left of max_decode_length=2"),
        ({"decoder_prefix": [5], "forced_bos_token_id": 6}, "both say the first token"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Generation(**options).resolved()


def test_what_a_model_cannot_do_is_refused():
    model, inputs = Seq2Seq(config()), np.ones((1, 3), np.int32)
    with pytest.raises(ValueError, match="cannot begin with token 20: the model has 0 to 19"):
        model.generate({}, inputs, Generation(forced_bos_token_id=20))
    with pytest.raises(ValueError, match="a prefix of 4 tokens leaves none of max_decode_length=4"):
        prefix = np.ones((1, 4), np.int32)
        model.generate({}, inputs, Generation(max_decode_length=4), prefix=prefix)
    with pytest.raises(ValueError, match=r"stop_strings=\('a',\) need a vocabulary"):
        model.generate({}, inputs, Generation(stop_strings="a"))
    with pytest.raises(ValueError, match="one output without beams, got num_beams=2"):
        model.stepwise(Generation(num_beams=2))


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.0},
        {"num_beams": 2, "length_penalty": 1.0},
        {"do_sample": True},
        {"no_repeat_ngram_size": 2},
        {"stop_strings": "a"},
        {"decoder_prefix": [3]},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_a_ctc_head_refuses_what_it_does_not_have_by_name(options):
    model = CTC(TINY_SPEECH.replace(vocab_size=9))
    name = [*options][-1]
    with pytest.raises(ValueError, match=f"max_decode_length and num_beams only, got .*{name}"):
        model.generate({}, np.ones((1, 3), np.float32), Generation(**options))
    with pytest.raises(ValueError, match="'ctc' do not come token by token"):
        model.stepwise(Generation())


def test_options_are_resolved_once_and_can_be_keys():
    options = Generation(num_beams=2, decoder_prefix=[5], stop_strings="a")
    made = options.resolved()
    assert made == made.resolved() and hash(made)
    assert (made.alpha, made.length_penalty, made.early_stopping) == (0.6, None, None)
    assert (made.max_decode_length, made.temperature) == (64, None)
    drawn = Generation(do_sample=True).resolved()
    assert (drawn.temperature, drawn.top_k, drawn.top_p) == (1.0, 50, 1.0)
    assert Generation(length_penalty=1.0).resolved().early_stopping is False
