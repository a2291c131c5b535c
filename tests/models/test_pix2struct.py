"""Pix2Struct's network: places of patches, packed images, decoding. Its numbers: golden files."""

import functools

import helpers
from helpers import (
    TINY_IMAGES,
    as_on_tpu,
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
import pytest

from coda_jax import methods, trees
from coda_jax.data import batches
from coda_jax.models.pix2struct.config import Pix2StructConfig
from coda_jax.models.pix2struct.network import PixelProjection
from coda_jax.objectives import Seq2Seq

config = functools.partial(helpers.config, base=TINY_IMAGES)
DENSE = config(num_encoder_layers=1)
ROUTED = config({"reduction": 3}, num_encoder_layers=1)
SIZES = [(3, 4), (1, 2), (2, 2), (0, 0), (1, 1)]  # of images, in patches


def is_patch(patches):
    return patches[..., 0] > 0


@pytest.mark.all
def test_a_small_and_a_large_image_give_what_each_gives_alone(rng):
    """Invariant 2, the whole network: what padding holds does not matter either."""
    params = random_params(ROUTED)
    patches = random_patches(rng, [(3, 4), (1, 2)], 12)
    targets = np.repeat(random_tokens(rng, [4], 4), 2, axis=0)

    def answer(patches):
        return logits(ROUTED, params, patches, shift_right(targets), targets)[: len(patches)]

    together = answer(patches)
    np.testing.assert_allclose(together[::-1], answer(patches[::-1]), atol=1e-5)
    np.testing.assert_allclose(together[1], answer(patches[[1, 1], :2])[0], atol=1e-5)
    noisy = patches.copy()
    noisy[1, 2:, 2:] = 5.0
    np.testing.assert_allclose(answer(noisy), together, atol=1e-5)


@pytest.mark.all
def test_packed_batches_have_the_loss_of_single_rows(rng):
    """Invariant 3, the whole network, on the batches that the trainer gets."""
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
        losses.append(jax.jit(Seq2Seq(ROUTED).loss)(random_params(ROUTED), batch)[1])
    np.testing.assert_allclose(losses[0].loss, losses[1].loss, rtol=1e-5)
    assert losses[0].examples == losses[1].examples == 3


def test_selected_patches_keep_their_places(rng):
    """A layer without position bias does not see positions: what it picks is what it computes."""
    params = random_params(ROUTED)
    patches = random_patches(rng, [(3, 4)], 12)
    order = rng.permutation(12)
    found, selections = encode(ROUTED, params, patches)
    shuffled, theirs = encode(ROUTED, params, patches[:, order])
    np.testing.assert_allclose(shuffled[0], found[0, order], atol=1e-5)
    for name, selection in selections.items():
        assert set(order[np.asarray(theirs[name].indices[0])]) == set(
            np.asarray(selection.indices[0]).tolist()
        )


def test_the_patches_projection_and_their_positions_are_frozen():
    trained, frozen = methods.partition(ROUTED, shapes(ROUTED)["params"])
    assert not [path for path in trees.flatten(trained) if path.startswith("patch_embedder/")]
    assert {path for path in trees.flatten(frozen) if path.startswith("patch_embedder/")} == {
        "patch_embedder/bias",
        "patch_embedder/column_embedder/embedding",
        "patch_embedder/projection/kernel",
        "patch_embedder/row_embedder/embedding",
    }


def test_an_image_with_more_rows_than_positions_is_not_read_in_silence(rng):
    patches = random_patches(rng, [(TINY_IMAGES.num_positions, 1)], 16)
    assert np.isnan(encode(DENSE, random_params(DENSE), patches)[0][0, -1]).all()


@pytest.mark.parametrize(
    "cfg", [pytest.param(DENSE, marks=pytest.mark.all), ROUTED], ids=["dense", "routed"]
)
def test_cached_decoding_gives_the_tokens_of_the_uncached_network(cfg, rng):
    params = random_params(cfg)
    patches = random_patches(rng, SIZES[:3], 12)
    search = jax.jit(functools.partial(Seq2Seq(cfg).predict, max_decode_length=5))
    tokens = search(params, patches)
    ones = np.ones_like(tokens)
    found = logits(cfg, params, patches, shift_right(np.asarray(tokens)), ones).argmax(-1)
    before_end = np.cumsum(tokens == 1, axis=-1) - (tokens == 1) == 0
    np.testing.assert_array_equal(np.asarray(tokens)[before_end], np.asarray(found)[before_end])


@pytest.mark.all
def test_beam_search_takes_patches(rng):
    patches = random_patches(rng, SIZES[:3], 12)
    model = Seq2Seq(ROUTED)
    beams = jax.jit(functools.partial(model.predict, max_decode_length=5, num_beams=2))
    assert beams(random_params(ROUTED), patches).shape == (3, 5)


def test_routing_has_the_weights_of_the_patches_that_a_layer_takes(rng):
    patches = random_patches(rng, SIZES, 13)
    cfg = config({"reduction": (1, 3)})
    weights = np.asarray(jax.jit(Seq2Seq(cfg).routing)(random_params(cfg), patches))
    np.testing.assert_array_equal(weights[0], is_patch(patches))
    assert (weights[1] > 0).sum(-1).tolist() == [4, 1, 2, 0, 1]
    assert (weights[:, ~is_patch(patches)] == 0).all()


@pytest.mark.parametrize("name", ["patch_size", "num_positions"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"Pix2StructConfig.{name} must be .* at least 1, got 0"):
        Pix2StructConfig(vocab_size=4, **{name: 0})


def test_the_projection_of_pixels_on_a_tpu_is_that_of_the_slice(rng):
    """Row and column, which are large numbers, are multiplied by zeros; the gradient too."""
    patches = random_patches(rng, [(3, 4), (1, 2)], 12)
    patches[..., :2] *= 1000
    project = PixelProjection(8, jnp.bfloat16)
    params = project.init(jax.random.key(0), patches)

    def gradient():
        def total(params):
            y = project.apply(params, patches)
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        (_, y), found = jax.value_and_grad(total, has_aux=True)(params)
        return np.float32(y), found["params"]["kernel"]

    expected = patches[..., 2:] @ np.float32(params["params"]["kernel"])
    y, usual = gradient()
    with as_on_tpu():
        on_tpu, found = gradient()
    for outputs in (y, on_tpu):
        np.testing.assert_allclose(outputs, expected, rtol=0.03, atol=0.03)
    np.testing.assert_allclose(found, usual, rtol=0.05, atol=0.05 * np.abs(usual).max())
