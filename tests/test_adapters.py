"""Many adapters in one batch: each row answers as with its adapter alone, whatever is added."""

import dataclasses

from helpers import TINY_SPEECH, adapted_params, config, random_frames, random_params
import jax
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.checkpoints import encoder_of, save_adapter
from coda_jax.inference import Decoding, Encodings, Predictor
from coda_jax.methods import Coda, Lora, Norms, ParallelAdapter, with_reduction
from coda_jax.models import placed
from coda_jax.sharding import Placement

CONFIG = config(coda={"reduction": 2.0}, num_encoder_layers=1, num_decoder_layers=1).replace(
    eos_id=11
)
BASE = random_params(CONFIG.dense(), seed=2)
GREEDY = Decoding(max_input_length=32, max_decode_length=6, batch_size=4)


def adapter(number, cfg=CONFIG):
    """(config, params) of an adapter of the base, another one for each number."""
    return cfg, adapted_params(cfg, BASE, seed=100 + number)


def texts(rng, count=7):
    """Random token arrays of several lengths."""
    return [rng.integers(2, 20, length) for length in rng.integers(2, 30, count)]


def alone(inputs, numbers, decoding=GREEDY, cfg=CONFIG):
    """{index: (tokens, scores)} of each input in a model that has its adapter alone."""
    predictor, found = Predictor(*adapter(numbers[0], cfg), decoding), {}
    for number in set(numbers):
        # One program for all, of which the parameters are an argument.
        predictor._params = placed(*adapter(number, cfg), predictor._placement)
        for index, *output in predictor.candidates(inputs):
            if numbers[index] == number:
                found[index] = output
    return found


def assert_as_alone(found, expected):
    """The same tokens, and scores within 1e-5."""
    found = {index: output for index, *output in found}
    assert found.keys() == expected.keys()
    for index, (tokens, scores) in found.items():
        np.testing.assert_array_equal(tokens, expected[index][0])
        np.testing.assert_allclose(scores, expected[index][1], rtol=1e-5, atol=1e-5)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "transformers' beams": {"num_beams": 2, "length_penalty": 1.0},
    "drawn": {"do_sample": True, "num_return_sequences": 2, "seed": 3},
    "begun, without repetitions": {"decoder_prefix": (4, 9), "no_repeat_ngram_size": 1},
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.all] if x != "greedy" else []) for x in WAYS]
)
def test_each_input_is_answered_as_with_its_adapter_alone(rng, name):
    """Also while adapters are added and replaced between calls, for which nothing is compiled."""
    decoding = dataclasses.replace(GREEDY, **WAYS[name])
    inputs, numbers = texts(rng), [0, 1, 2, 1, 0, 2, 2]
    predictor = Predictor(
        CONFIG.dense(), BASE, decoding, adapters={str(i): adapter(i) for i in range(3)}
    )
    names = [str(number) for number in numbers]
    found = [*predictor.candidates(inputs, adapters=names)]
    assert len({tokens.tobytes() for _, tokens, _ in found}) > 3
    programs = predictor.num_programs
    predictor.adapters.add("1", adapter(7))
    predictor.adapters.add("3", adapter(3))
    changed = [3, 7, 2, 7, 0, 3, 2]
    names = [{7: "1"}.get(number, str(number)) for number in changed]
    later = [*predictor.candidates(inputs, 7, names)]
    assert predictor.num_programs == programs
    expected = alone(inputs + inputs, numbers + changed, decoding)
    assert_as_alone([*found, *((7 + index, *output) for index, *output in later)], expected)


@pytest.mark.all
def test_any_number_of_adapters_shares_a_program(rng):
    predictor = Predictor(CONFIG.dense(), BASE, GREEDY, adapters={"0": adapter(0)})
    inputs = texts(rng, 4)
    [*predictor(inputs, adapters=["0"] * 4)]
    for number in range(1, 9):  # over the edges of 1, 2, 4 and 8 places
        predictor.adapters.add(str(number), adapter(number))
    numbers = [8, 3, 4, 1]
    found = predictor.candidates(inputs, adapters=[str(number) for number in numbers])
    assert_as_alone(found, alone(inputs, numbers))
    assert predictor.num_programs == 1
    assert predictor.adapters.names == [*map(str, range(9))]


@pytest.mark.all
@pytest.mark.parametrize(
    "methods",
    [
        (Lora(rank=2),),
        (Coda(2.0), Lora(rank=2, targets=(r"attention/\w+$",))),
        (Norms(),),
        (Coda(2.0, cross_attention="selected"), ParallelAdapter(4)),
    ],
    ids=["lora", "coda+lora", "norms", "selected"],
)
def test_other_methods_answer_so_too(rng, methods):
    cfg = CONFIG.replace(methods=methods)
    inputs, numbers = texts(rng), [0, 1, 2, 1, 0, 2, 2]
    adapters = {str(i): adapter(i, cfg) for i in range(3)}
    predictor = Predictor(cfg.dense(), BASE, GREEDY, adapters=adapters)
    found = predictor.candidates(inputs, adapters=[str(number) for number in numbers])
    assert_as_alone(found, alone(inputs, numbers, cfg=cfg))


@pytest.mark.all
@pytest.mark.parametrize("mesh", [{"data": 1}, {"model": 2}])
def test_devices_share_rows_or_heads(rng, mesh):
    """By default, two devices share the rows."""
    placement = Placement(mesh, jax.devices()[: max(mesh.values())])
    inputs, numbers = texts(rng), [0, 1, 2, 1, 0, 2, 2]
    adapters = {str(i): adapter(i) for i in range(3)}
    predictor = Predictor(CONFIG.dense(), BASE, GREEDY, placement=placement, adapters=adapters)
    found = predictor.candidates(inputs, adapters=[str(number) for number in numbers])
    assert_as_alone(found, alone(inputs, numbers))


@pytest.mark.all
def test_a_stream_has_its_adapter(rng):
    adapters = {str(i): adapter(i) for i in range(2)}
    predictor = Predictor(CONFIG.dense(), BASE, GREEDY, adapters=adapters)
    (text,) = texts(rng, 1)
    for number in (0, 1):
        ((tokens, _),) = alone([text], [number]).values()
        streamed = [*predictor.stream(text, adapter=str(number))]
        assert streamed == tokens[0][: len(streamed)].tolist()
    with pytest.raises(ValueError, match="1 inputs need the names of their adapters, got none"):
        predictor.stream(text)


@pytest.mark.all
def test_transcripts_are_those_of_each_adapter_alone(rng):
    cfg = TINY_SPEECH.replace(methods=(Coda(2.0), ParallelAdapter(bottleneck=4)))
    base = random_params(cfg.dense())
    whole = {str(i): (cfg, adapted_params(cfg, base, seed=100 + i)) for i in range(3)}
    frames = [row[:n] for n, row in zip((5, 9, 7), random_frames(rng, (5, 9, 7), 9), strict=True)]
    for beams in (1, 3):
        decoding = Decoding(max_decode_length=9, batch_size=4, num_beams=beams)
        predictor = Predictor(cfg.dense(), base, decoding, adapters=whole)
        found = dict(predictor(frames, adapters=["2", "0", "1"]))
        for index, name in enumerate(("2", "0", "1")):
            expected = dict(Predictor(*whole[name], decoding)(frames))
            np.testing.assert_array_equal(found[index], expected[index])


@pytest.mark.all
@pytest.mark.parametrize("embed", ["mean", "tokens", None])
def test_encodings_are_those_of_each_adapter_alone(rng, embed):
    """Each with its own head; they may be given with the encoder-decoder that they belong to."""
    head = {} if embed else {"head": "classification", "labels": ("a", "b")}
    cfg = CONFIG.encoder_only().replace(**head)
    base = encoder_of(CONFIG.dense(), BASE)[1]
    whole = {str(i): (cfg, adapted_params(cfg, base, seed=100 + i)) for i in range(3)}
    decoding = Decoding(batch_size=4, max_input_length=32)
    encodings = Encodings(CONFIG.dense(), BASE, decoding, embed, adapters=whole)
    inputs, names = texts(rng), ["0", "1", "2", "1", "0", "2", "2"]
    for index, found in encodings(inputs, adapters=names):
        expected = dict(Encodings(*whole[names[index]], decoding, embed)(inputs))
        np.testing.assert_allclose(found, expected[index], atol=1e-5)


# --- What is refused ---


@pytest.fixture(scope="module", name="predictor")
def fixture_predictor():
    """With the adapters "a" and "b"."""
    adapters = {"a": adapter(0), "b": adapter(1)}
    return Predictor(CONFIG.dense(), BASE, GREEDY, adapters=adapters)


def changed(params, path, change):
    """The tree with another value of a leaf."""
    flat = trees.flatten(params)
    return trees.unflatten({**flat, path: change(np.array(flat[path]))})


def with_nan(leaf):
    """The leaf with a value that is none."""
    leaf.reshape(-1)[3] = np.nan
    return leaf


ROUTER = "encoder/layers_0/router/kernel"
FROZEN = "encoder/layers_0/attention/query/kernel"
REFUSED = {
    "another base": (
        lambda cfg, params: (cfg, changed(params, FROZEN, lambda x: x + 1)),
        ValueError,
        rf"adapter 'a': the adapters have other bases; frozen leaves differ:\n  {FROZEN}$",
    ),
    "another field": (
        lambda cfg, params: (cfg.replace(methods=with_reduction(cfg.methods, 3.0)), params),
        ValueError,
        "adapter 'a' differs from the others: Coda.reduction=3.0, not 2.0$",
    ),
    "another size": (
        lambda cfg, params: (cfg.replace(emb_dim=99), params),
        ValueError,
        "adapter 'a' differs from the others: emb_dim=99, not .*",
    ),
    "another dtype": (
        lambda cfg, params: (cfg, changed(params, ROUTER, lambda x: x.astype(np.float16))),
        ValueError,
        f"adapter 'a': {ROUTER} is float16, not float32",
    ),
    "another shape": (
        lambda cfg, params: (cfg, changed(params, ROUTER, lambda x: x[1:])),
        ValueError,
        f"the leaves of adapter 'a' do not match .*\n.*wrong shape: {ROUTER}",
    ),
    "not finite": (
        lambda cfg, params: (cfg, changed(params, ROUTER, with_nan)),
        FloatingPointError,
        f"{ROUTER} has values that are not finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_does_not_belong_is_refused_when_it_is_added(predictor, name):
    """What has its name stays."""
    change, error, named = REFUSED[name]
    before = jax.tree.map(np.asarray, predictor.adapters.of_rows(["a", "b"], 2))
    with pytest.raises(error, match=named):
        predictor.adapters.add("a", change(*adapter(5)))
    assert predictor.adapters.names == ["a", "b"]
    after = predictor.adapters.of_rows(["a", "b"], 2)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_a_file_of_another_base_is_refused(predictor, tmp_path):
    cfg, params = adapter(5)
    save_adapter(tmp_path / "good", cfg, params)
    save_adapter(tmp_path / "wrong", cfg, changed(params, FROZEN, lambda x: x + 1))
    with pytest.raises(ValueError, match=f"wrong belongs to another base; 1 of .*\n  {FROZEN}$"):
        predictor.adapters.add("a", tmp_path / "wrong")
    found = Predictor(cfg.dense(), BASE, GREEDY, adapters={"x": tmp_path / "good"})
    leaves = trees.flatten(found.adapters.of_rows(["x"], 2))
    assert leaves and all(np.array_equal(x[0], trees.flatten(params)[p]) for p, x in leaves.items())


def test_names_that_are_missing_or_unknown_are_told(rng, predictor):
    inputs = texts(rng, 2)
    with pytest.raises(ValueError, match="2 inputs need the names of their adapters, got none"):
        next(predictor(inputs))
    with pytest.raises(ValueError, match=r"2 inputs need .*, got 1 of them"):
        next(predictor(inputs, adapters=["a"]))
    with pytest.raises(ValueError, match=r"input 8 .*: no adapter is called 'c'; there are a, b$"):
        next(predictor(inputs, first=7, adapters=["a", "c"]))
    with pytest.raises(ValueError, match="the name of an adapter must be a text"):
        predictor.adapters.add("", adapter(0))
    one = Predictor(*adapter(0), GREEDY)
    with pytest.raises(ValueError, match="the model was made without: adapters="):
        next(one(inputs, adapters=["a", "b"]))


def test_adapters_that_share_nothing_or_are_none_are_refused():
    with pytest.raises(ValueError, match="there must be one at least"):
        Predictor(CONFIG.dense(), BASE, GREEDY, adapters={})
    with pytest.raises(ValueError, match="adapter 'x' trains nothing"):
        Predictor(CONFIG.dense(), BASE, GREEDY, adapters={"x": (CONFIG.dense(), BASE)})
    other = CONFIG.replace(methods=(Norms(),))
    with pytest.raises(ValueError, match=r"the config has \(Norms.*adapter 'x' \(Coda"):
        Predictor(other, BASE, GREEDY, adapters={"x": adapter(0)})


def test_the_base_stays_as_it_is(predictor):
    """Invariant 5, whatever is added."""
    predictor.adapters.add("b", adapter(1))
    frozen = trees.flatten(predictor._params)
    flat = trees.flatten(BASE)
    assert frozen.keys() < flat.keys()
    assert all(np.array_equal(leaf, flat[path]) for path, leaf in frozen.items())
