"""The speech networks: the design's invariants. Their numbers: test_hf_w2v_bert.py."""

import dataclasses
import functools

import helpers
from helpers import (
    TINY_SPEECH,
    encode,
    logits,
    random_frames,
    random_params,
    random_tokens,
    shapes,
    shift_right,
)
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coda_jax import benchmark, conformer, decoding, flops, models, training
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.routing import CodaConfig, num_selected
from coda_jax.speech import SpeechToText, W2vBertConfig, split_frames

config = functools.partial(helpers.config, base=TINY_SPEECH)
METHODS = {
    "dense": config(),
    "adapter": config(adapter=AdapterConfig(bottleneck=4)),
    "k_to_k": config({"reduction": 3, "max_segments": 4}),
    "k_to_all": config({"reduction": 2.5, "attention": "k_to_all", "max_segments": 4}),
    "truncation": config({"reduction": 2, "routing": "truncation"}),
}
ROUTED = ["k_to_k", "k_to_all", "truncation"]
LENGTHS = [12, 2, 5, 0, 1]  # of a batch of 12 frames: one shape, to share compilations


def batch_of(rng, lengths, num_frames, target_lengths):
    targets = random_tokens(rng, target_lengths, max(target_lengths))
    return {
        "encoder_input_tokens": random_frames(rng, lengths, num_frames),
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def one_layer(name):
    return METHODS[name].replace(num_encoder_layers=1)


@pytest.mark.parametrize("name", ["k_to_k", "k_to_all"])
def test_every_gradient_is_finite_and_reaches_its_leaf(name, rng):
    cfg = one_layer(name)
    model = models.CTC(cfg)
    batch = batch_of(rng, LENGTHS, 12, [5, 1, 2, 0, 0])
    gradient = jax.jit(jax.grad(lambda params: model.loss(params, batch)[0]))(random_params(cfg))
    for path, leaf in params_lib.flatten(gradient).items():
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), path


@pytest.mark.parametrize("attention", ["k_to_k", "k_to_all"])
def test_reduction_of_one_with_fresh_adapters_is_the_dense_model(attention, rng):
    """Invariant 1."""
    cfg = config({"reduction": 1.0, "attention": attention})
    params = random_params(cfg, fresh=True)
    dense, _ = params_lib.split_new(params)
    frames = random_frames(rng, LENGTHS, 12)
    found, expected = encode(cfg, params, frames)[0], encode(cfg.dense(), dense, frames)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "k_to_k", "k_to_all"])
def test_a_short_and_a_long_utterance_give_what_each_gives_alone(name, rng):
    """Invariant 2: neither padding, its length, place and values, nor the other rows matter.

    The short utterance leaves slots empty, which lie between those of its selected frames.
    """
    cfg = METHODS[name]
    params = random_params(cfg)

    def encoded(frames):
        return np.asarray(encode(cfg, params, frames)[0])

    frames = random_frames(rng, LENGTHS, 12)
    together, alone = encoded(frames), encoded(frames[2:3, :5])[0]
    np.testing.assert_allclose(together[2, :5], alone, atol=1e-5)
    np.testing.assert_allclose(encoded(frames[::-1])[::-1], together, atol=1e-5)
    changed = frames.copy()
    changed[2, 5:, 1:] = 5.0
    np.testing.assert_allclose(encoded(changed)[2, :5], alone, atol=1e-5)
    in_front = np.concatenate([changed[:, 5:], changed[:, :5]], axis=1)
    np.testing.assert_allclose(encoded(in_front)[2, 7:], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "k_to_k"])
def test_packed_utterances_give_what_they_give_alone(name, rng):
    """Invariant 3: the convolution does not reach into the utterance before either."""
    cfg = METHODS[name]
    params = random_params(cfg)
    lengths = [3, 7, 1]
    frames = random_frames(rng, lengths, 7)
    alone, _ = encode(cfg, params, frames)
    _, mask = split_frames(frames)
    packed = np.pad(frames[mask], ((0, 2), (0, 0)))[None]
    segments = np.pad(np.repeat([1, 2, 3], lengths), (0, 2)).astype(np.int32)[None]
    found, _ = encode(cfg, params, packed, segments)
    np.testing.assert_allclose(found[0, :11], alone[mask], atol=1e-5)


@pytest.mark.parametrize("name", ROUTED)
def test_budget_is_kept_in_every_layer(name, rng):
    """Invariant 4: k frames of each utterance in ascending order, never one of padding."""
    cfg = METHODS[name]
    frames = random_frames(rng, LENGTHS, 12)
    _, selections = encode(cfg, random_params(cfg), frames)
    assert sorted(selections) == ["layers_0", "layers_1"]
    for selection in selections.values():
        valid, indices = np.asarray(selection.valid), np.asarray(selection.indices)
        assert valid.sum(-1).tolist() == [num_selected(n, cfg.coda.reduction) for n in LENGTHS]
        assert np.take_along_axis(frames[..., 0] > 0, indices, axis=1)[valid].all()
        assert (np.diff(indices) > 0).all()
        assert (np.asarray(selection.weights)[~valid] == 0).all()


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


@pytest.mark.parametrize("name", ["dense", "k_to_k", "k_to_all"])
def test_a_layer_equals_the_equations(name, rng):
    """Attention sees the true distances, the convolution the selected frames as neighbours."""
    cfg = one_layer(name)
    params = random_params(cfg)
    frames = random_frames(rng, [11], 11)
    encoded, selections = encode(cfg, params, frames)
    flat = {k: np.asarray(v, np.float64) for k, v in params_lib.flatten(params["encoder"]).items()}
    p = {path.removeprefix("layers_0/"): leaf for path, leaf in flat.items()}

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}/scale"] + p[f"{name}/bias"]

    projection = "feature_projection/projection"
    x = norm("feature_projection/layer_norm", frames[0, :, 1:].astype(np.float64))
    x = x @ p[f"{projection}/kernel"] + p[f"{projection}/bias"]
    u = norm("pre_first_mlp_layer_norm", x)
    indices, weights = np.arange(11), np.ones(11)
    if cfg.coda is not None:
        (selection,) = selections.values()
        indices, weights = (np.asarray(v[0]) for v in (selection.indices, selection.weights))
        assert (np.diff(indices) > 1).any()  # there are gaps
    here = (x[indices], u[indices], indices)
    everything = (x, u, np.arange(11)) if name == "k_to_all" else here
    expected = x.copy()
    delta = conformer_layer(p, *here, everything, cfg) - x[indices]
    expected[indices] += weights[:, None] * delta
    if cfg.adapter is not None:
        expected += np.maximum(u @ p["adapter/wi/kernel"], 0) @ p["adapter/wo/kernel"]
    np.testing.assert_allclose(encoded[0], expected, rtol=1e-4, atol=1e-5)


def test_causal_convolution_is_that_of_xla(rng):
    x, kernel = rng.normal(size=(2, 9, 3)), rng.normal(size=(4, 3))
    expected = jax.lax.conv_general_dilated(
        x, kernel[:, None], (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=3,
    )  # fmt: skip
    found = conformer.causal_convolution(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_frozen_leaves_keep_their_bits_and_the_head_is_trained(rng):
    """Invariant 5, through the trainer's step."""
    cfg = one_layer("k_to_k")
    model, before = models.for_config(cfg), random_params(cfg)
    batch = batch_of(rng, [12, 5], 12, [3, 1])
    optimizer = optax.adamw(1e-2)
    trained, frozen = params_lib.partition(jax.tree.map(jnp.array, before))
    state = training.TrainState(jnp.int32(0), trained, optimizer.init(trained))
    step = training.make_train_step(model, optimizer, 1, 0)
    losses = []
    for _ in range(3):
        state, sums = step(state, frozen, batch)
        losses.append(float(sums.loss))
    assert losses[-1] < losses[0]
    after = params_lib.flatten(params_lib.merge(state.trained, frozen))
    for path, leaf in params_lib.flatten(before).items():
        same = np.array_equal(leaf, after[path])
        assert same != params_lib.matches(path, params_lib.TRAINED["adapters"]), path
    changed = {path.split("/")[-2] for path in params_lib.flatten(state.trained)}
    norms = {name for name in changed if name.endswith("norm")}
    assert changed == norms | {"wi", "wo", "router", "ctc_head"} and len(norms) == 6


@pytest.mark.parametrize("attention", ["k_to_k", "k_to_all"])
def test_compiled_work_falls_as_the_formula_says(attention):
    """Invariant 8, by XLA's count of operations; within 5 %, room for softmax and norms."""
    wide = dataclasses.replace(
        one_layer("adapter"), emb_dim=128, head_dim=64, mlp_dim=256, feature_dim=32
    )
    for reduction in (1, 4):
        cfg = wide.replace(coda=CodaConfig(reduction, attention=attention))
        model = models.CTC(cfg)
        params = jax.eval_shape(model.init, jax.random.key(0))
        compiled = jax.jit(model.encode).lower(params, cfg.input_spec(2, 256)).compile()
        expected = flops.encoder_flops(cfg, 2, 256)
        np.testing.assert_allclose(benchmark.flops(compiled), expected, rtol=0.05)


AXIS_NAMES = {"embed", "mlp", "heads", "kv", "joined_kv", "vocab", "relpos_buckets", "length"}


@pytest.mark.parametrize(
    "cfg", [METHODS["k_to_k"], METHODS["k_to_k"].replace(num_decoder_layers=1)]
)
def test_every_parameter_has_axis_names_that_t5x_knows(cfg):
    made = shapes(cfg)
    params = params_lib.flatten(made["params"])
    axes = params_lib.flatten(made["params_axes"])
    assert axes.keys() == {f"{path}_axes" for path in params}
    for path, leaf in params.items():
        names = axes[f"{path}_axes"].names
        assert len(names) == len(leaf.shape) == len(set(names)) and set(names) <= AXIS_NAMES, path


def test_cached_decoding_gives_the_tokens_of_the_uncached_network(rng):
    cfg = one_layer("k_to_k").replace(num_decoder_layers=1)
    params = random_params(cfg)
    frames = random_frames(rng, [12, 2, 6], 12)
    search = jax.jit(functools.partial(decoding.greedy, SpeechToText(cfg), max_decode_length=5))
    tokens, _ = search(params, frames)
    ones = np.ones_like(tokens)
    found = logits(cfg, params, frames, shift_right(np.asarray(tokens)), ones).argmax(-1)
    before_end = np.cumsum(tokens == 1, axis=-1) - (tokens == 1) == 0
    np.testing.assert_array_equal(np.asarray(tokens)[before_end], np.asarray(found)[before_end])


def test_silence_is_not_padding(rng):
    """Frames whose features are all zero count."""
    cfg = METHODS["dense"]
    frames = random_frames(rng, LENGTHS, 12)
    silent = frames.copy()
    silent[2, 5:, 0] = 1
    first, second = (np.asarray(encode(cfg, random_params(cfg), f)[0]) for f in (frames, silent))
    assert np.abs(first[2, :5] - second[2, :5]).max() > 1e-3


def test_dropout_needs_an_rng_and_changes_the_loss(rng):
    cfg = one_layer("k_to_k").replace(dropout_rate=0.3)
    logits, params = jax.jit(models.CTC(cfg).logits), random_params(cfg)
    batch = batch_of(rng, [12, 5], 12, [3, 1])
    plain, dropped = (logits(params, batch, key) for key in (None, jax.random.key(0)))
    assert np.isfinite(plain).all() and np.isfinite(dropped).all()
    assert np.abs(plain - dropped).max() > 0.1


def test_inputs_of_another_width_are_refused(rng):
    frames = random_frames(rng, [5], 5, feature_dim=9)
    with pytest.raises(ValueError, match=r"takes inputs \[B, N, \*\(7,\)\], got .* \(1, 5, 10\)"):
        encode(METHODS["dense"], random_params(METHODS["dense"]), frames)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"feature_dim": 0}, "W2vBertConfig.feature_dim must be at least 1, got 0"),
        ({"max_right_distance": -1}, "max_right_distance must be at least 0, got -1"),
        ({"vocab_size": 0, "num_decoder_layers": 1}, "vocab_size must be at least 1, got 0"),
        ({"blank_id": 4}, "blank_id must be below vocab_size=4, got 4"),
    ],
)
def test_sizes_that_make_no_model_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        W2vBertConfig(**{"vocab_size": 4, **changes})
