"""Pix2Struct: the design's invariants for images. Its numbers: test_hf_pix2struct.py."""

import dataclasses
import functools

import helpers
from helpers import (
    TINY_IMAGES,
    encode,
    logits,
    random_params,
    random_patches,
    random_tokens,
    shapes,
    shift_right,
)
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coda_jax import batches, benchmark, decoding, flops, training
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.models import EncoderDecoder
from coda_jax.routing import CodaConfig, num_selected
from coda_jax.vision import Pix2Struct, Pix2StructConfig

config = functools.partial(helpers.config, base=TINY_IMAGES)
METHODS = {
    "dense": config(),
    "adapter": config(adapter=AdapterConfig(bottleneck=4)),
    "k_to_k": config({"reduction": 3}),
    "k_to_all": config({"reduction": 2.5, "attention": "k_to_all"}),
    "truncation": config({"reduction": 2, "routing": "truncation"}),
}
ROUTED = ["k_to_k", "k_to_all", "truncation"]
SIZES = [(3, 4), (1, 2), (2, 2), (0, 0), (1, 1)]  # of images, in patches


def is_patch(patches):
    return patches[..., 0] > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_gradient_is_finite_and_reaches_its_leaf(name, rng):
    cfg = METHODS[name]
    patches, targets = random_patches(rng, SIZES, 13), random_tokens(rng, [6, 0, 4, 2, 1], 6)

    @jax.jit
    def loss(params):
        found = logits(cfg, params, patches, shift_right(targets), targets)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(found), targets[..., None], axis=-1)
        return -jnp.sum(chosen[..., 0] * (targets > 0))

    for path, leaf in params_lib.flatten(jax.grad(loss)(random_params(cfg))).items():
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), path


@pytest.mark.parametrize("attention", ["k_to_k", "k_to_all"])
def test_reduction_of_one_with_fresh_adapters_is_the_dense_model(attention, rng):
    """Invariant 1."""
    cfg = config({"reduction": 1.0, "attention": attention})
    params = random_params(cfg, fresh=True)
    dense, _ = params_lib.split_new(params)
    patches, targets = random_patches(rng, SIZES, 12), random_tokens(rng, [6, 3, 4, 1, 2], 6)
    np.testing.assert_allclose(
        logits(cfg, params, patches, shift_right(targets), targets),
        logits(cfg.dense(), dense, patches, shift_right(targets), targets),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_small_and_a_large_image_give_what_each_gives_alone(name, rng):
    """Invariant 2: neither padding nor the other rows change anything, values in padding too."""
    cfg = METHODS[name]
    params = random_params(cfg)
    patches = random_patches(rng, [(3, 4), (1, 2)], 12)
    targets = random_tokens(rng, [4, 4], 4)

    def answer(patches):
        return logits(cfg, params, patches, shift_right(targets[:1]), targets[:1])[0]

    together = logits(cfg, params, patches, shift_right(targets[[0, 0]]), targets[[0, 0]])
    np.testing.assert_allclose(together[0], answer(patches[:1]), atol=1e-5)
    np.testing.assert_allclose(together[1], answer(patches[1:, :2]), atol=1e-5)
    noisy = patches.copy()
    noisy[1, 2:, 2:] = 5.0
    found = logits(cfg, params, noisy, shift_right(targets[[0, 0]]), targets[[0, 0]])
    np.testing.assert_allclose(found, together, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_packed_images_give_what_they_give_alone(name, rng):
    """Invariant 3."""
    cfg = METHODS[name]
    params = random_params(cfg)
    images = random_patches(rng, [(1, 3), (2, 2), (1, 1)], 4)
    alone, _ = encode(cfg, params, images)
    packed = np.concatenate([image[is_patch(image)] for image in images])
    segments = np.repeat([1, 2, 3], is_patch(images).sum(-1)).astype(np.int32)
    found, _ = encode(
        cfg, params, np.pad(packed, ((0, 2), (0, 0)))[None], np.pad(segments, (0, 2))[None]
    )
    np.testing.assert_allclose(found[0, :8], alone[is_patch(images)], atol=1e-5)


def test_packed_batches_have_the_loss_of_single_rows(rng):
    """Invariant 3, the whole network, on the batches that the trainer gets."""
    cfg = METHODS["k_to_k"]
    images, targets = random_patches(rng, [(1, 3), (2, 2), (1, 1)], 4), [[5, 1], [7, 8, 1], [1]]
    examples = [
        {"inputs": image[is_patch(image)], "targets": np.array(tokens)}
        for image, tokens in zip(images, targets, strict=True)
    ]
    losses = []
    for pack, rows in ((False, 3), (True, 1)):
        lengths = {"inputs": 12, "targets": 8}
        (batch,) = batches.batch_examples(
            examples, batch_size=rows, feature_lengths=lengths, pack=pack
        )
        losses.append(jax.jit(EncoderDecoder(cfg).loss)(random_params(cfg), batch)[1])
    np.testing.assert_allclose(losses[0].loss, losses[1].loss, rtol=1e-5)
    assert losses[0].examples == losses[1].examples == 3


@pytest.mark.parametrize("name", ROUTED)
def test_budget_is_kept_in_every_layer(name, rng):
    """Invariant 4: k patches of each image in ascending order, never one of padding."""
    cfg = METHODS[name]
    patches = random_patches(rng, SIZES, 13)
    _, selections = encode(cfg, random_params(cfg), patches)
    assert sorted(selections) == ["layers_0", "layers_1"]
    for selection in selections.values():
        valid, indices = np.asarray(selection.valid), np.asarray(selection.indices)
        k = [num_selected(rows * columns, cfg.coda.reduction) for rows, columns in SIZES]
        assert valid.sum(-1).tolist() == k
        assert np.take_along_axis(is_patch(patches), indices, axis=1)[valid].all()
        assert (np.diff(indices) > 0).all()
        assert (np.asarray(selection.weights)[~valid] == 0).all()


def test_selected_patches_keep_their_places(rng):
    """A layer without position bias does not see positions: what it picks is what it computes."""
    cfg = METHODS["k_to_k"]
    params = random_params(cfg)
    patches = random_patches(rng, [(3, 4)], 12)
    order = rng.permutation(12)
    found, selections = encode(cfg, params, patches)
    shuffled, theirs = encode(cfg, params, patches[:, order])
    np.testing.assert_allclose(shuffled[0], found[0, order], atol=1e-5)
    for name, selection in selections.items():
        assert set(order[np.asarray(theirs[name].indices[0])]) == set(
            np.asarray(selection.indices[0]).tolist()
        )


def test_frozen_leaves_keep_their_bits(rng):
    """Invariant 5, through the trainer's step."""
    cfg = config({"reduction": 2})
    model, before = EncoderDecoder(cfg), random_params(cfg)
    targets = random_tokens(rng, [4, 2], 4)
    batch = {
        "encoder_input_tokens": random_patches(rng, [(3, 4), (1, 2)], 12),
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }
    optimizer = optax.adamw(1e-2)
    trained, frozen = params_lib.partition(jax.tree.map(jnp.array, before))
    state = training.TrainState(jnp.int32(0), trained, optimizer.init(trained))
    step = training.make_train_step(model, optimizer, 1, 0)
    first = None
    for _ in range(3):
        state, sums = step(state, frozen, batch)
        first = sums.loss if first is None else first
    assert sums.loss < first
    after = params_lib.flatten(params_lib.merge(state.trained, frozen))
    for path, leaf in params_lib.flatten(before).items():
        same = np.array_equal(leaf, after[path])
        assert same != params_lib.matches(path, params_lib.TRAINED["adapters"]), path
    assert not params_lib.matches("patch_embedder/bias", params_lib.TRAINED["adapters"])


@pytest.mark.parametrize("attention", ["k_to_k", "k_to_all"])
def test_compiled_work_falls_as_the_formula_says(attention):
    """Invariant 8, by XLA's count of operations; within 5 %, room for softmax and norms."""
    wide = dataclasses.replace(
        TINY_IMAGES, emb_dim=128, head_dim=64, mlp_dim=256, patch_size=8, adapter=helpers.ADAPTER
    )
    for reduction in (1, 4, (1, 5)):
        cfg = wide.replace(coda=CodaConfig(reduction, attention=attention))
        model = EncoderDecoder(cfg)
        params = jax.eval_shape(model.init, jax.random.key(0))
        compiled = jax.jit(model.encode).lower(params, cfg.input_spec(2, 256)).compile()
        expected = flops.encoder_flops(cfg, 2, 256)
        np.testing.assert_allclose(benchmark.flops(compiled), expected, rtol=0.05)


AXIS_NAMES = {"embed", "mlp", "heads", "kv", "joined_kv", "vocab", "relpos_buckets"}


def test_every_parameter_has_axis_names_that_t5x_knows():
    made = shapes(METHODS["k_to_k"])
    params = params_lib.flatten(made["params"])
    axes = params_lib.flatten(made["params_axes"])
    assert axes.keys() == {f"{path}_axes" for path in params}
    for path, leaf in params.items():
        names = axes[f"{path}_axes"].names
        assert len(names) == len(leaf.shape) == len(set(names)) and set(names) <= AXIS_NAMES, path


def test_an_image_with_more_rows_than_positions_is_not_read_in_silence(rng):
    patches = random_patches(rng, [(TINY_IMAGES.num_positions, 1)], 16)
    assert np.isnan(encode(config(), random_params(config()), patches)[0][0, -1]).all()


@pytest.mark.parametrize("name", ["dense", "k_to_k"])
def test_cached_decoding_gives_the_tokens_of_the_uncached_network(name, rng):
    cfg = METHODS[name]
    params = random_params(cfg)
    patches = random_patches(rng, SIZES[:3], 12)
    search = jax.jit(functools.partial(decoding.greedy, Pix2Struct(cfg), max_decode_length=5))
    tokens, _ = search(params, patches)
    ones = np.ones_like(tokens)
    found = logits(cfg, params, patches, shift_right(np.asarray(tokens)), ones).argmax(-1)
    before_end = np.cumsum(tokens == 1, axis=-1) - (tokens == 1) == 0
    np.testing.assert_array_equal(np.asarray(tokens)[before_end], np.asarray(found)[before_end])
    model = EncoderDecoder(cfg)
    beams = jax.jit(functools.partial(model.predict, max_decode_length=5, num_beams=2))
    assert beams(params, patches).shape == (3, 5)


def test_routing_has_the_weights_of_the_patches_that_a_layer_takes(rng):
    patches = random_patches(rng, SIZES, 13)
    cfg = config({"reduction": (1, 3)})
    weights = np.asarray(jax.jit(EncoderDecoder(cfg).routing)(random_params(cfg), patches))
    np.testing.assert_array_equal(weights[0], is_patch(patches))
    assert (weights[1] > 0).sum(-1).tolist() == [4, 1, 2, 0, 1]
    assert (weights[:, ~is_patch(patches)] == 0).all()


@pytest.mark.parametrize("name", ["patch_size", "num_positions"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"Pix2StructConfig.{name} must be at least 1, got 0"):
        Pix2StructConfig(vocab_size=4, **{name: 0})
