"""The speech networks: layers, places of padding, heads. Their numbers: golden files."""

import functools

import helpers
from helpers import (
    TINY_SPEECH,
    encode,
    logits,
    random_frames,
    random_params,
    shapes,
    shift_right,
)
import jax
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.models.w2v_bert.config import W2vBertConfig
from coda_jax.objectives import CTC, Seq2Seq

config = functools.partial(helpers.config, base=TINY_SPEECH)
METHODS = {
    "dense": config(),
    "k_to_k": config({"reduction": 3}),
    "k_to_all": config({"reduction": 2.5, "attention": "k_to_all"}),
}
DENSE = METHODS["dense"]
LENGTHS = [12, 2, 5, 0, 1]  # of a batch of 12 frames: one shape, to share compilations


def one_layer(name):
    return METHODS[name].replace(num_encoder_layers=1)


@pytest.mark.parametrize("name", ["dense", "k_to_k"])
def test_frames_may_stand_behind_their_padding(name, rng):
    """Invariant 2: the short utterance leaves slots empty, between those of its selected frames."""
    cfg = one_layer(name)
    params = random_params(cfg)
    frames = np.array(random_frames(rng, LENGTHS, 12))
    expected = encode(cfg, params, frames)[0][2, :5]
    frames[2, 5:, 1:] = 5.0
    in_front = np.concatenate([frames[:, 5:], frames[:, :5]], axis=1)
    np.testing.assert_allclose(encode(cfg, params, in_front)[0][2, 7:], expected, atol=1e-5)


def conformer_layer(p, x, u, positions, everything, cfg):
    """The Conformer layer on frames x [K, D] at their positions, frame by frame in float64.

    Of the frames in `everything`, (x, u, positions), all are attended to.
    """

    def norm(name, x):
        normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + cfg.layer_norm_epsilon
        )
        return normed * p[f"{name}/scale"] + p[f"{name}/bias"]

    def dense(name, x):
        return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)

    def swish(x):
        return x / (1 + np.exp(-x))

    def mlp(name, u):
        return dense(f"{name}/wo", swish(dense(f"{name}/wi", u)))

    all_x, all_u, all_positions = everything
    h = x + 0.5 * mlp("first_mlp", u)
    kv = norm("pre_attention_layer_norm", all_x + 0.5 * mlp("first_mlp", all_u))
    q = dense("attention/query", norm("pre_attention_layer_norm", h))
    k, v = dense("attention/key", kv), dense("attention/value", kv)
    y = np.zeros_like(q)
    for head in np.split(np.arange(q.shape[1]), cfg.num_heads):
        for i, place in enumerate(positions):
            distance = np.clip(
                all_positions - place, -cfg.max_left_distance, cfg.max_right_distance
            )
            vectors = p["attention/distance_embedding"][distance + cfg.max_left_distance]
            score = ((k[:, head] + vectors) @ q[i, head]) / np.sqrt(len(head))
            weights = np.exp(score - score.max())
            y[i, head] = weights / weights.sum() @ v[:, head]
    h = h + dense("attention/out", y)

    a, gate = np.split(dense("convolution/wi", norm("convolution/layer_norm", h)), 2, -1)
    a = a / (1 + np.exp(-gate))
    kernel = p["convolution/depthwise_kernel"]
    y = np.zeros_like(h)
    for i in range(len(h)):
        for lag in range(min(cfg.conv_width, i + 1)):
            y[i] += kernel[cfg.conv_width - 1 - lag] * a[i - lag]
    h = h + dense("convolution/wo", swish(norm("convolution/depthwise_layer_norm", y)))

    h = h + 0.5 * mlp("second_mlp", norm("pre_second_mlp_layer_norm", h))
    return norm("final_layer_norm", h)


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_equals_the_equations(name, rng):
    """Attention sees the true distances, the convolution the selected frames as neighbours."""
    cfg = one_layer(name)
    params = random_params(cfg)
    frames = random_frames(rng, [11], 11)
    encoded, selections = encode(cfg, params, frames)
    flat = {k: np.asarray(v, np.float64) for k, v in trees.flatten(params["encoder"]).items()}
    p = {path.removeprefix("layers_0/"): leaf for path, leaf in flat.items()}

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}/scale"] + p[f"{name}/bias"]

    projection = "feature_projection/projection"
    x = norm("feature_projection/layer_norm", frames[0, :, 1:].astype(np.float64))
    x = x @ p[f"{projection}/kernel"] + p[f"{projection}/bias"]
    u = norm("pre_first_mlp_layer_norm", x)
    indices, weights = np.arange(11), np.ones(11)
    if selections:
        (selection,) = selections.values()
        indices, weights = (np.asarray(v[0]) for v in (selection.indices, selection.weights))
        assert (np.diff(indices) > 1).any()  # there are gaps
    here = (x[indices], u[indices], indices)
    everything = (x, u, np.arange(11)) if name == "k_to_all" else here
    expected = x.copy()
    delta = conformer_layer(p, *here, everything, cfg) - x[indices]
    expected[indices] += weights[:, None] * delta
    if cfg.methods:
        expected += np.maximum(u @ p["adapter/wi/kernel"], 0) @ p["adapter/wo/kernel"]
    np.testing.assert_allclose(encoded[0], expected, rtol=1e-4, atol=1e-5)


def test_the_norms_and_the_head_are_trained_with_router_and_adapter():
    trained, _ = methods.partition(METHODS["k_to_k"], shapes(METHODS["k_to_k"])["params"])
    modules = {path.split("/")[-2] for path in trees.flatten(trained)}
    norms = {name for name in modules if name.endswith("norm")}
    assert modules == norms | {"wi", "wo", "router", "ctc_head"} and len(norms) == 6


def test_every_parameter_of_a_model_with_decoder_has_axis_names():
    made = shapes(METHODS["k_to_k"].replace(num_decoder_layers=1))
    params, axes = trees.flatten(made["params"]), trees.flatten(made["params_axes"])
    assert axes.keys() == {f"{path}_axes" for path in params}
    for path, leaf in params.items():
        names = axes[f"{path}_axes"].names
        assert len(names) == len(leaf.shape) == len(set(names)), path


@pytest.mark.all
def test_cached_decoding_gives_the_tokens_of_the_uncached_network(rng):
    cfg = one_layer("k_to_k").replace(num_decoder_layers=1)
    params = random_params(cfg)
    frames = random_frames(rng, [12, 2, 6], 12)
    search = jax.jit(functools.partial(Seq2Seq(cfg).predict, max_decode_length=5))
    tokens = search(params, frames)
    ones = np.ones_like(tokens)
    found = logits(cfg, params, frames, shift_right(np.asarray(tokens)), ones).argmax(-1)
    before_end = np.cumsum(tokens == 1, axis=-1) - (tokens == 1) == 0
    np.testing.assert_array_equal(np.asarray(tokens)[before_end], np.asarray(found)[before_end])


def test_silence_is_not_padding(rng):
    """Frames whose features are all zero count."""
    cfg = one_layer("dense")
    frames = random_frames(rng, LENGTHS, 12)
    silent = frames.copy()
    silent[2, 5:, 0] = 1
    first, second = (np.asarray(encode(cfg, random_params(cfg), f)[0]) for f in (frames, silent))
    assert np.abs(first[2, :5] - second[2, :5]).max() > 1e-3


@pytest.mark.all
def test_dropout_needs_an_rng_and_changes_the_loss(rng):
    cfg = one_layer("k_to_k").replace(dropout_rate=0.3)
    logits, params = jax.jit(CTC(cfg).logits), random_params(cfg)
    batch = {"encoder_input_tokens": random_frames(rng, [12, 5], 12)}
    plain, dropped = (logits(params, batch, key) for key in (None, jax.random.key(0)))
    assert np.isfinite(plain).all() and np.isfinite(dropped).all()
    assert np.abs(plain - dropped).max() > 0.1


def test_inputs_of_another_width_are_refused(rng):
    frames = random_frames(rng, [5], 5, feature_dim=9)
    with pytest.raises(ValueError, match=r"takes inputs \[B, N, \*\(7,\)\], got .* \(1, 5, 10\)"):
        encode(DENSE, random_params(DENSE), frames)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"feature_dim": 0}, "W2vBertConfig.feature_dim must be .* at least 1, got 0"),
        ({"max_right_distance": -1}, "max_right_distance must be .* at least 0, got -1"),
        ({"vocab_size": 0, "num_decoder_layers": 1}, "vocab_size must be .* at least 1, got 0"),
        ({"blank_id": 4}, "blank_id must be below vocab_size=4, got 4"),
    ],
)
def test_sizes_that_make_no_model_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        W2vBertConfig(**{"vocab_size": 4, **changes})
