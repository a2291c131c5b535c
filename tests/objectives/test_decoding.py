"""Greedy and beam search: the same tokens and scores as the uncached network gives."""

import functools
import itertools

from helpers import (
    TINY_IMAGES,
    as_on_tpu,
    logits,
    random_params,
    random_patches,
    random_tokens,
    shift_right,
)
from helpers import config as any_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.methods import Lora, PrefixTuning
from coda_jax.models.t5.network import Transformer
from coda_jax.nn import dot_product_attention
from coda_jax.objectives import Generation, beams, decoding, model_for

EOS = 1
config = functools.partial(any_config, num_encoder_layers=1, num_decoder_layers=2)
CODA = {"reduction": 2, "epsilon": 0.1}
CONFIGS = {  # routing is in the encoder alone, and the output layer behind the decoder
    "dense, untied": config(),
    "dense, tied": config(logits_via_embedding=True, mlp_activations=("relu",)),
    "coda, untied": config(CODA),
    "prefix, tied": config(CODA, PrefixTuning(3, hidden=0), logits_via_embedding=True),
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def generate(cfg, params, inputs, options):
    return model_for(cfg).generate(params, inputs, options)


def greedy(cfg, params, inputs, *, max_decode_length):
    """Returns tokens [B, L] and log-probabilities [B]."""
    options = Generation(max_decode_length=max_decode_length)
    return [x[:, 0] for x in generate(cfg, params, inputs, options)]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_decode_length", "num_beams"))
def beam_search(cfg, params, inputs, num_beams=1, prefix=(), **options):
    """Returns all M beams; alpha and prefix are traced, so that one program serves all."""
    options = Generation(num_beams=num_beams, **options).resolved()
    given = jnp.array([[cfg.decoder_start_id, *prefix]] * (len(inputs) * num_beams))
    return beams.beam_search(Transformer(cfg), params, inputs, given, options)


def log_probs(cfg, params, inputs, decoder_inputs):
    """Returns [B, T, V] of the network without a cache; no target counts as padding."""
    ones = np.ones_like(decoder_inputs)
    return np.asarray(jax.nn.log_softmax(logits(cfg, params, inputs, decoder_inputs, ones)))


def total_log_prob(cfg, params, inputs, tokens):
    """Returns [B]: the sum over the tokens of each row, up to its end token; 0 for padding."""
    all_log_probs = log_probs(cfg, params, inputs, shift_right(tokens))
    chosen = np.take_along_axis(all_log_probs, tokens[..., None], axis=-1)[..., 0]
    before = np.cumsum(tokens == EOS, axis=-1) - (tokens == EOS)
    return (chosen * (before == 0)).sum(-1) * inputs.any(-1)


def lengths(tokens):
    """Returns [...]: tokens up to the end token; all of them where there is none."""
    ended = (tokens == EOS).any(-1)
    return np.where(ended, (tokens == EOS).argmax(-1) + 1, tokens.shape[-1])


def naive_greedy(cfg, params, inputs, length):
    """Runs the whole network anew on each prefix; a row of padding has no answer."""
    tokens = np.zeros((len(inputs), length), np.int32)
    ended = ~inputs.any(-1)
    for t in range(length):
        best = log_probs(cfg, params, inputs, shift_right(tokens))[:, t].argmax(-1)
        tokens[:, t] = np.where(ended, 0, best)
        ended |= tokens[:, t] == EOS
    return tokens


def ending_params(cfg, seed=0, strength=2.0):
    """Returns parameters with which EOS is favoured by `strength`.

    The first entry of the decoder's residual stream is made a constant that only EOS reads.
    """
    assert not cfg.logits_via_embedding
    flat = trees.flatten(random_params(cfg, seed))
    for path, leaf in flat.items():
        if path == "token_embedder/embedding":
            flat[path] = leaf.at[:, 0].set(3.0)
        elif path == "decoder/decoder_norm/scale":
            flat[path] = leaf.at[0].set(1.0)
        elif path == "decoder/logits_dense/kernel":
            flat[path] = leaf.at[0].set(0.0).at[0, EOS].set(strength)
        elif path.startswith("decoder") and path.endswith(("wo/kernel", "out/kernel")):
            flat[path] = leaf.at[:, 0].set(0.0)
    return trees.unflatten(flat)


@pytest.mark.parametrize(
    "name",
    [
        "coda, untied",
        "prefix, tied",
        *(pytest.param(n, marks=pytest.mark.all) for n in CONFIGS if n.startswith("dense")),
    ],
)
def test_greedy_equals_the_uncached_network(name, rng):
    cfg = CONFIGS[name]
    params = random_params(cfg, seed=1)
    inputs = random_tokens(rng, [7, 3, 9, 1, 0, 5, 9, 8], 9)
    tokens, total = greedy(cfg, params, inputs, max_decode_length=8)
    assert tokens.dtype == jnp.int32 and total.dtype == jnp.float32
    np.testing.assert_array_equal(tokens, naive_greedy(cfg, params, inputs, 8))
    np.testing.assert_allclose(
        total, total_log_prob(cfg, params, inputs, np.asarray(tokens)), atol=1e-4
    )


def test_greedy_rows_that_end_early_keep_eos_and_stay_padded(rng):
    cfg = config()
    params = ending_params(cfg, strength=0.4)
    inputs = random_tokens(rng, rng.integers(1, 9, 24), 9)
    tokens, total = map(np.asarray, greedy(cfg, params, inputs, max_decode_length=8))
    ends = lengths(tokens)
    assert ends.min() < 4 and not (tokens == EOS).any(-1).all()  # the case is a real one
    for row, end in zip(tokens, ends, strict=True):
        assert not row[end:].any() and EOS not in row[: end - 1]
    np.testing.assert_array_equal(tokens, naive_greedy(cfg, params, inputs, 8))
    np.testing.assert_allclose(total, total_log_prob(cfg, params, inputs, tokens), atol=1e-4)


class CountingModel:
    """A Transformer that counts how often it decodes with a cache, at run time."""

    def __init__(self, cfg, options):
        self.config, self.model = cfg, Transformer(cfg)
        self.steps = 0
        search = decoding.decode if options.num_beams == 1 else beams.beam_search
        given = jnp.zeros((2 * options.num_beams, 1), jnp.int32)
        self.search = jax.jit(lambda *args: search(self, *args, given, options.resolved()))

    def input_mask(self, inputs):
        return self.model.input_mask(inputs)

    def apply(self, variables, *args, **kwargs):
        if "cache" in variables:
            jax.debug.callback(self.count)
        return self.model.apply(variables, *args, **kwargs)

    def count(self):
        self.steps += 1

    def steps_of(self, *args):
        """How many steps the search takes."""
        self.steps = 0
        jax.block_until_ready(self.search(*args))
        jax.effects_barrier()
        return self.steps


@pytest.mark.parametrize(
    "options, fewest",
    # Of beams the likeliest output ends at once, and the runner-up takes another step.
    [({"num_beams": 1}, 1), ({"num_beams": 2}, 2), ({"num_beams": 2, "length_penalty": 1.0}, 2)],
    ids=["greedy", "beams of T5X", "beams of transformers"],
)
def test_search_stops_when_it_cannot_improve(options, fewest, rng, monkeypatch):
    cfg = config()
    inputs = random_tokens(rng, [5, 3], 6)
    counting = CountingModel(cfg, Generation(max_decode_length=12, **options))
    assert counting.steps_of(ending_params(cfg, strength=50.0), inputs) == fewest
    assert counting.steps_of(ending_params(cfg, strength=-50.0), inputs) == 12
    monkeypatch.setattr(decoding, "FIRST_PLACES", 1)
    counting = CountingModel(cfg, Generation(max_decode_length=12, **options))
    assert counting.steps_of(ending_params(cfg, strength=50.0), inputs) == fewest
    assert counting.steps_of(ending_params(cfg, strength=-50.0), inputs) == 12


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 1}, {"num_beams": 2}, {"num_beams": 2, "length_penalty": 1.0}],
    ids=["greedy", "beams of T5X", "beams of transformers"],
)
def test_rows_of_padding_take_no_step_and_have_no_output(options, rng):
    cfg = config()
    counting = CountingModel(cfg, Generation(max_decode_length=12, **options))
    inputs = random_tokens(rng, [5, 3], 6)
    filled_up, nothing = inputs * [[1], [0]], np.zeros_like(inputs)
    for strength in (50.0, 1.0, -50.0):  # ending at once, somewhere, at the limit
        params = ending_params(cfg, strength=strength)
        assert counting.steps_of(params, nothing) == 0
        tokens, scores = map(np.asarray, counting.search(params, filled_up))
        alone = counting.steps_of(params, inputs[[0, 0]])
        assert counting.steps_of(params, filled_up) == alone
        expected, _ = counting.search(params, inputs)
        np.testing.assert_array_equal(tokens[0], expected[0])
        assert not tokens[1].any() and scores[1].flat[0] == 0 and (scores[1].flat[1:] < -1e6).all()
        assert np.isfinite(scores).all()


@pytest.mark.all
def test_padding_behind_a_prefix_has_nothing_but_it(rng):
    cfg = config()
    params = ending_params(cfg, strength=-50.0)
    inputs = random_tokens(rng, [5, 3], 6) * [[0], [1]]
    options = {"decoder_prefix": (4, 7), "max_decode_length": 5}
    drawn = {"do_sample": True, "num_return_sequences": 2}
    for more in ({}, {"num_beams": 2, "num_return_sequences": 2}, drawn):
        tokens, scores = generate(cfg, params, inputs, Generation(**options, **more))
        assert (np.asarray(tokens)[0, 0] == [4, 7, 0, 0, 0]).all() and scores[0, 0] == 0
        assert (np.asarray(tokens)[1] != 0).all()


@pytest.mark.all
def test_rows_of_an_image_without_patches_have_no_output(rng):
    patches = random_patches(rng, [(2, 2), (0, 0)], 6)
    options = Generation(max_decode_length=5)
    tokens, scores = generate(TINY_IMAGES, random_params(TINY_IMAGES), patches, options)
    assert np.asarray(tokens)[0].any() and not np.asarray(tokens)[1].any() and scores[1, 0] == 0


@pytest.mark.parametrize(
    ("longest", "num_given", "sizes"),
    [
        (1, 1, (1,)),
        (64, 1, (64,)),
        (65, 1, (64, 65)),
        (300, 1, (64, 256, 300)),
        (300, 70, (256, 300)),
    ],
)
def test_a_cache_grows_fourfold(longest, num_given, sizes):
    assert decoding.cache_places(longest, num_given) == sizes


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"do_sample": True, "top_k": 3}, marks=pytest.mark.all),
        {"num_beams": 3},
        pytest.param({"decoder_prefix": (4,) * 3}, marks=pytest.mark.all),
    ],
    ids=["greedy", "sampling", "beams", "prefix"],
)
def test_outputs_do_not_depend_on_the_sizes_of_the_cache(options, rng, monkeypatch):
    """Whichever of its sizes an output ends in."""
    cfg = config()
    options = Generation(max_decode_length=11, **options)
    inputs = random_tokens(rng, rng.integers(1, 9, 12), 9)
    params = ending_params(cfg, seed=2, strength=1.0)
    expected = generate(cfg, params, inputs, options)
    assert {11} < {*lengths(np.asarray(expected[0])).flat}  # some end early, some do not
    monkeypatch.setattr(decoding, "FIRST_PLACES", 2)
    monkeypatch.setattr(decoding, "GROWTH", 2)
    found = jax.jit(model_for(cfg).generate, static_argnums=2)(params, inputs, options)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def all_outputs(vocab_size, length):
    """Returns every token sequence [count, length] that ends within `length`, padded with 0."""
    others = [token for token in range(vocab_size) if token != EOS]
    return np.array(
        [
            [*prefix, EOS] + [0] * (length - len(prefix) - 1)
            for count in range(length)
            for prefix in itertools.product(others, repeat=count)
        ],
        np.int32,
    )


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_beam_search_equals_enumeration(alpha, rng):
    length = 3
    cfg = config(CODA, vocab_size=4)
    params = random_params(cfg, seed=3)
    inputs = random_tokens(rng, [6, 2, 4], 6, vocab_size=4)
    outputs = all_outputs(4, length)
    count = len(outputs)  # 1 + 3 + 9
    # In the last step 9 live beams have 36 continuations, and twice the beams are looked at.
    kwargs = {"max_decode_length": length, "num_beams": 18, "alpha": alpha}
    tokens, scores = beam_search(cfg, params, inputs, **kwargs)
    for i, row in enumerate(inputs):
        total = total_log_prob(cfg, params, np.tile(row, (count, 1)), outputs)
        expected = total / ((5 + lengths(outputs)) / 6) ** alpha
        order = np.argsort(-expected)
        assert np.diff(expected[order]).max() < -1e-4  # no ties that rounding could swap
        np.testing.assert_array_equal(tokens[i, :count], outputs[order])
        np.testing.assert_allclose(scores[i, :count], expected[order], atol=1e-4)
        assert (scores[i, count:] < -1e6).all()


@pytest.mark.parametrize(
    "name",
    [
        "dense, tied",
        *(pytest.param(n, marks=pytest.mark.all) for n in CONFIGS if n != "dense, tied"),
    ],
)
def test_beam_scores_are_those_of_the_tokens(name, rng):
    cfg = CONFIGS[name]
    tied = cfg.logits_via_embedding
    params = random_params(cfg, seed=5) if tied else ending_params(cfg, seed=5, strength=1.4)
    inputs = random_tokens(rng, [7, 3, 9, 1, 4, 5], 9)
    kwargs = {"max_decode_length": 7, "num_beams": 3, "alpha": 0.6}
    tokens, scores = map(np.asarray, beam_search(cfg, params, inputs, **kwargs))
    assert tokens.shape == (6, 3, 7) and scores.dtype == np.float32
    assert (np.diff(scores, axis=-1) <= 0).all()
    ended = (tokens == EOS).any(-1)
    assert tied or (ended.any(-1).any() and len(np.unique(lengths(tokens))) > 2)
    penalty = np.where(ended.any(-1, keepdims=True), ((5 + lengths(tokens)) / 6) ** 0.6, 1.0)
    flat = tokens.reshape(-1, 7)
    total = total_log_prob(cfg, params, np.repeat(inputs, 3, axis=0), flat).reshape(6, 3)
    found = scores > -1e6
    assert found[:, 0].all()
    np.testing.assert_allclose(scores[found], (total / penalty)[found], atol=1e-4)
    for row in tokens[ended]:
        assert not row[lengths(row) :].any()
    for row in tokens[found.all(-1)]:
        assert len(np.unique(row, axis=0)) == 3


@pytest.mark.all
def test_beams_never_do_worse_than_greedy_where_its_path_survives(rng):
    """Without a length penalty, and with the greedy path kept, its score is a lower bound."""
    cfg = config()
    params = ending_params(cfg, seed=2, strength=0.4)
    inputs = random_tokens(rng, rng.integers(1, 9, 12), 9)
    tokens, total = map(np.asarray, greedy(cfg, params, inputs, max_decode_length=8))
    kwargs = {"max_decode_length": 8, "alpha": 0.0}
    _, scores = beam_search(cfg, params, inputs, num_beams=12, **kwargs)
    ended = (tokens == EOS).any(-1)
    assert ended.any()
    assert (np.asarray(scores)[ended, 0] >= total[ended] - 1e-5).all()


@pytest.mark.all
def test_one_beam_of_a_sharp_model_is_greedy(rng):
    """One beam differs from greedy where EOS is the runner-up: not if the winner is certain."""
    cfg = config()
    params = ending_params(cfg, seed=2, strength=0.4)
    kernel = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = kernel * 20
    inputs = random_tokens(rng, rng.integers(1, 9, 12), 9)
    tokens, total = map(np.asarray, greedy(cfg, params, inputs, max_decode_length=8))
    kwargs = {"max_decode_length": 8, "num_beams": 1, "alpha": 0.0}
    beams, scores = map(np.asarray, beam_search(cfg, params, inputs, **kwargs))
    ended = (tokens == EOS).any(-1) & (total > -0.5)
    assert ended.any()
    np.testing.assert_array_equal(beams[ended, 0], tokens[ended])
    np.testing.assert_allclose(scores[ended, 0], total[ended], atol=1e-5)


@pytest.mark.parametrize("prefix", [(), (4, 7)], ids=["", "prefix"])
@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_beam_search_equals_t5x(num_beams, strength, prefix, rng):
    t5x_decoding = pytest.importorskip(
        "t5x.decoding", reason="T5X is not installed", exc_type=ImportError
    )
    cfg, length = config(), 8
    params = ending_params(cfg, seed=num_beams, strength=strength)
    inputs = random_tokens(rng, rng.integers(1, 9, 10), 9)
    repeated = np.repeat(inputs, num_beams, axis=0)

    def next_logits(state):
        ones = jnp.ones_like(state.sequences)
        all_logits = logits(cfg, params, repeated, state.sequences, ones)
        return all_logits[:, state.cur_index], state.cache

    given = np.zeros((len(inputs), length), np.int32)
    given[:, 1 : 1 + len(prefix)] = prefix
    expected, expected_scores = t5x_decoding.beam_search(
        jnp.asarray(given),
        {},
        next_logits,
        EOS,
        num_decodes=num_beams,
        alpha=0.6,
    )
    kwargs = {"max_decode_length": length, "num_beams": num_beams, "alpha": 0.6}
    tokens, scores = beam_search(cfg, params, inputs, prefix=prefix, **kwargs)
    # T5X has the best beam last.
    expected, expected_scores = np.asarray(expected)[:, ::-1], np.asarray(expected_scores)[:, ::-1]
    found = expected_scores > -1e6  # other slots hold no output
    assert found[:, 0].all() and (np.asarray(scores)[~found] < -1e6).all()
    np.testing.assert_array_equal(np.asarray(tokens)[found], expected[found])
    np.testing.assert_allclose(np.asarray(scores)[found], expected_scores[found], atol=1e-5)


@pytest.mark.all
def test_results_do_not_depend_on_padding_and_other_rows(rng):
    """Invariant 2, in the shapes of the tests above."""
    cfg = CONFIGS["coda, untied"]
    params = random_params(cfg, seed=7)
    rows = random_tokens(rng, [7, 3, 5, 9, 8, 1], 9)
    kwargs = {"max_decode_length": 7, "num_beams": 3, "alpha": 0.6}
    together = beam_search(cfg, params, rows, **kwargs)
    empty = np.pad(rows, ((0, 2), (0, 0)))
    greedy_together = [x[:6] for x in greedy(cfg, params, empty, max_decode_length=8)]
    wide = np.pad(rows[::-1], ((1, 0), (0, 5)))  # other order, an empty row, more padding
    apart = [x[1:][::-1] for x in beam_search(cfg, params, wide, **kwargs)]
    greedy_apart = [x[1:][::-1] for x in greedy(cfg, params, wide, max_decode_length=8)]
    for one, other in zip((*together, *greedy_together), (*apart, *greedy_apart), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("num_beams", "worth_a_source"),
    [
        (1, 0),
        (3, 1000),
        pytest.param(1, 1000, marks=pytest.mark.all),
        pytest.param(3, 0, marks=pytest.mark.all),
    ],
)
def test_answers_on_tpus_are_the_same(num_beams, worth_a_source, rng, monkeypatch):
    """From the encoding itself, and from keys and values; also where a method changes these."""
    monkeypatch.setattr(dot_product_attention, "_WORTH_A_SOURCE", worth_a_source)
    cfg = config(CODA, Lora(targets=(r"attention/(key|value)$",)))
    params = random_params(cfg, seed=1)
    inputs = random_tokens(rng, [7, 3, 9, 1, 0, 5, 9, 8], 9)
    options = Generation(max_decode_length=8, num_beams=num_beams)

    def answers():
        return jax.jit(functools.partial(generate.__wrapped__, cfg, options=options))(
            params, inputs
        )

    expected = answers()
    with as_on_tpu():
        found = answers()
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    assert len(np.unique(found[0])) > 3


def test_cache_has_one_entry_per_input_not_per_beam(rng):
    cfg = config()

    @jax.jit
    def cache_of(params, inputs):
        given = jnp.zeros((8, 1), jnp.int32)
        options = Generation(max_decode_length=7).resolved()
        return decoding.begin(Transformer(cfg), params, inputs, given, options)[2].cache

    cache = cache_of(random_params(cfg), random_tokens(rng, [5, 3], 6))
    layer = cache["decoder"]["layers_0"]
    assert layer["encoded_key"].shape == layer["encoded_value"].shape == (2, 2, 6, 8)
    assert layer["cache"]["cached_key"].shape == (8, 2, 7, 8)
    assert layer["cache"]["cache_index"] == 0


@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_largest_continuations_are_those_of_top_k(count, rng):
    """Equal ones, those that are not finite, and a vocabulary of less than is asked for."""
    values = rng.integers(0, 5, (6, 3, 7)).astype(np.float32)
    values[1, :, 2:] = -np.inf
    values[2, 1, 3] = np.nan
    values[3] = -np.inf
    found = jax.jit(lambda x: beams._largest_in_rounds(x, count=count))(values)
    expected = jax.lax.top_k(values.reshape(6, -1), count)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("penalty", [-1.0, -3.0, -10.0])
def test_a_length_penalty_below_zero_ends_no_search_early(penalty, rng):
    """Scores fall below any finite number for an empty slot."""
    cfg = config()
    params, x = ending_params(cfg, strength=0.4), random_tokens(rng, [5], 6)
    asked = Generation(
        max_decode_length=40,
        num_beams=2,
        num_return_sequences=2,
        length_penalty=penalty,
        min_new_tokens=36,
    )
    tokens, scores = map(np.asarray, generate(cfg, params, x, asked))
    lengths = (tokens != cfg.pad_id).sum(-1)
    assert (lengths >= 36).all() and np.isfinite(scores).all()
