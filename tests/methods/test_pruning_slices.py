"""The smaller model that pruning leaves where layers have kept different heads and channels."""

import functools

from contract.programs import batch_of
from helpers import TINY, TINY_IMAGES, TINY_SPEECH, assert_same_tree, random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import checkpoints, methods, trees
from coda_jax.methods import Lora, StructuredPruning
from coda_jax.methods.pruning_groups import MASK, group_norms, masks_of
from coda_jax.models import check_divides, param_shapes
from coda_jax.objectives import model_for
from coda_jax.profiling import flops
from coda_jax.sharding import Placement

DEEP = {"num_heads": 4, "num_decoder_layers": 2, "dropout_rate": 0.0}
BASES = {
    "text": TINY.replace(**DEEP),
    "biases of layers": TINY.replace(**DEEP, shared_relpos_bias=False),
    "images": TINY_IMAGES.replace(**DEEP),
    "speech": TINY_SPEECH.replace(num_heads=4, dropout_rate=0.0),
    "speech to text": TINY_SPEECH.replace(**DEEP),
}


def of_families(*default):
    """A parameter for each base; of those that are not named only in the long run."""
    return pytest.mark.parametrize(
        "base",
        [pytest.param(x, id=name, marks=() if name in default else pytest.mark.all)
         for name, x in BASES.items()],
    )  # fmt: skip


def pruned(base, seed=0):
    """(config, params) with random masks, one group at least in each set."""
    config = base.replace(methods=(StructuredPruning(rank=2),))
    rng = np.random.default_rng(seed)
    flat = trees.flatten(random_params(config))
    for path, leaf in flat.items():
        if path.endswith(("pruning_rows", "pruning_columns")):
            flat[path] = leaf * leaf.shape[0] ** -0.5
    for path, mask in masks_of(flat).items():
        kept = rng.random(mask.size) < 0.5
        kept[rng.integers(mask.size)] = True
        flat[path] = jnp.asarray(kept, jnp.float32)
    return config, trees.unflatten(flat)


def logits_of(config, params):
    return jax.jit(model_for(config).logits)(params, batch_of(config))


@of_families("text")
def test_the_smaller_model_of_unequal_layers_answers_as_the_masked_one(base, tmp_path):
    """Also from disk, in our own layout."""
    config, params = pruned(base)
    small_config, small = methods.sliced(config, params)
    assert small_config.layer_sizes and trees.count(small) < trees.count(params)
    assert not checkpoints.save_dense(tmp_path, small_config, small)
    again_config, again = checkpoints.load_hf(tmp_path)
    assert again_config == small_config == checkpoints.load_hf_config(tmp_path)
    assert_same_tree(again, small)
    expected = np.asarray(logits_of(config, params))
    np.testing.assert_allclose(
        logits_of(again_config, again), expected, atol=1e-5 * np.abs(expected).max()
    )


@of_families()
def test_it_decodes_with_a_cache_as_the_masked_one(base):
    """Greedily, and with beams, whose caches are put into another order."""
    config, params = pruned(base)
    inputs = batch_of(config)["encoder_input_tokens"]
    options = {"max_decode_length": 6, "num_beams": 3} if config.num_decoder_layers else {}

    def answers(config, params):
        answer = functools.partial(model_for(config).predict, **options)
        return np.asarray(jax.jit(answer)(params, inputs))

    found = answers(*methods.sliced(config, params))
    np.testing.assert_array_equal(found, answers(config, params))


@of_families(*BASES)
def test_sizes_of_layers_are_those_of_its_matrices(base):
    """What counts of operations and methods read of a config, beside its leaves."""
    config, params = methods.sliced(*pruned(base))
    leaves = {
        path: leaf.shape
        for path, leaf in trees.flatten(params).items()
        if "/layers_" in path and path.endswith("/kernel")
    }
    found = {
        f"{place.path}/{p.path}/kernel": (p.inputs, p.outputs)
        for stack in ("encoder", "decoder")
        for place in config.places(stack)
        for p in config.projections(place)
    }
    assert found == leaves
    assert flops.encoder_flops(config, 1, 8) < flops.encoder_flops(base, 1, 8)


@pytest.mark.all
def test_it_is_pruned_and_adapted_further():
    """Pruning what was pruned leaves less, and LoRA fits the matrices that are there."""
    config, params = methods.sliced(*pruned(BASES["text"]))
    again = config.replace(methods=(StructuredPruning(rank=2),))
    flat = trees.flatten(checkpoints.swap_in(again, params, jax.random.key(0)))
    path = f"encoder/layers_0/mlp/wo/{MASK}"
    flat[path] = jnp.arange(flat[path].size) < 3
    smaller_config, smaller = methods.sliced(again, trees.unflatten(flat))
    assert dict(smaller_config.layer_sizes)["encoder/layers_0/mlp"] == 3
    np.testing.assert_allclose(
        logits_of(smaller_config, smaller), logits_of(again, trees.unflatten(flat)), atol=1e-4
    )
    adapted = config.replace(methods=(Lora(rank=2),))
    shapes = trees.flatten(param_shapes(adapted))
    for path in [path for path in shapes if path.endswith("/lora_b")]:
        assert shapes[path].shape[1] == shapes[path.replace("/lora_b", "/kernel")].shape[1]


@pytest.mark.all
def test_layers_that_kept_other_heads_have_biases_of_their_own(tmp_path):
    """Of equal sizes they have a place in Hugging Face's layout, that of an umT5."""
    config, params = pruned(BASES["text"])
    flat = trees.flatten(params)
    for number, (path, mask) in enumerate(masks_of(flat).items()):
        half = np.arange(mask.size) % 2 == number % 2
        flat[path] = jnp.asarray(half, jnp.float32)
    params = trees.unflatten(flat)
    small_config, small = methods.sliced(config, params)
    assert (small_config.num_heads, small_config.mlp_dim) == (2, 12)
    assert not small_config.layer_sizes and not small_config.shared_relpos_bias
    assert checkpoints.save_dense(tmp_path, small_config, small)
    small_config, small = checkpoints.load_hf(tmp_path)
    expected = np.asarray(logits_of(config, params))
    np.testing.assert_allclose(
        logits_of(small_config, small), expected, atol=1e-5 * np.abs(expected).max()
    )


def test_an_encoder_alone_keeps_the_sizes_of_its_layers():
    config, params = methods.sliced(*pruned(BASES["text"]))
    encoder, leaves = checkpoints.encoder_of(config, params)
    assert {path.split("/")[0] for path, _ in encoder.layer_sizes} == {"encoder"}
    trees.check_tree(param_shapes(encoder), leaves)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((("encoder/layers_9/mlp", 3),), r"layer_sizes names \['encoder/layers_9/mlp'\], which"),
        ((("encoder/layers_0/wo", 3),), r"names \['encoder/layers_0/wo'\], .* such as decoder/lay"),
        ((("encoder/layers_0/mlp", 3),) * 2, r"names \['encoder/layers_0/mlp'\], .* each once"),
        ((("encoder/layers_0/mlp", 0),), r"layer_sizes\[0\]\[1\] must be a whole .* at least 1"),
        ((("encoder/layers_0/mlp",),), r"layer_sizes\[0\] must be a pair"),
        ((("encoder/layers_0/attention", 1),), "cannot share a position bias"),
    ],
)
def test_sizes_of_what_is_not_there_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(layer_sizes=sizes)


def test_masks_of_other_numbers_are_refused():
    config, params = pruned(BASES["text"])
    flat = trees.flatten(params)
    path = f"encoder/layers_0/mlp/wo/{MASK}"
    for wrong in (flat[path] * 0.5, flat[path] * 0, flat[path] * np.nan):
        with pytest.raises(ValueError, match=f"masks must be of zeros and ones, .*{path}"):
            methods.sliced(config, trees.unflatten({**flat, path: wrong}))


def test_what_has_no_place_for_them_names_them(tmp_path):
    config, params = methods.sliced(*pruned(BASES["text"]))
    path, size = config.layer_sizes[0]
    with pytest.raises(ValueError, match=rf"no place in Hugging Face's layout: \('{path}', {size}"):
        checkpoints.save_hf(tmp_path, config, params)
    with pytest.raises(ValueError, match="must be a multiple of the 2 devices along 'model'"):
        check_divides(config, Placement({"model": 2}))
    images = TINY_IMAGES.replace(shared_relpos_bias=False)
    with pytest.raises(ValueError, match="layers of a Hugging Face Pix2Struct share one position"):
        checkpoints.save_hf(tmp_path, images, random_params(images))


def test_attentions_that_keep_the_same_heads_but_other_numbers_of_them():
    """In each stack; no position bias is shared by attentions of two sizes."""
    base = TINY.replace(num_heads=4, num_encoder_layers=1, dropout_rate=0.0)
    config, params = pruned(base)
    flat = trees.flatten(params)
    for path, mask in masks_of(flat).items():
        if path.endswith(f"dot_product/{MASK}"):
            kept = 3 if path.startswith("encoder") else 2
            flat[path] = jnp.where(jnp.arange(mask.size) < kept, 1.0, 0.0)
    params = trees.unflatten(flat)
    small, leaves = methods.sliced(config, params)
    expected = logits_of(config, params)
    error = np.abs(logits_of(small, leaves) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


def test_norms_of_groups_leave_the_weights_as_they_are():
    """Also where they are arrays of numpy."""
    rng = np.random.default_rng(0)
    leaves = {
        "kernel": rng.standard_normal((4, 6)).astype(np.float32),
        "pruning_rows": rng.standard_normal((4, 2)).astype(np.float32),
        "pruning_columns": rng.standard_normal((2, 6)).astype(np.float32),
    }
    before = leaves["kernel"].copy()
    norms = group_norms({"wi": leaves}, 6)
    np.testing.assert_array_equal(leaves["kernel"], before)
    whole = before + leaves["pruning_rows"] @ leaves["pruning_columns"]
    np.testing.assert_allclose(norms, np.linalg.norm(whole, axis=0), rtol=1e-5)


def test_a_model_of_unequal_layers_is_not_pruned_as_if_they_were_equal():
    config, params = pruned(BASES["text"])
    small, _ = methods.sliced(config, params)
    with pytest.raises(ValueError, match="scope='uniform' is of layers of one size"):
        small.replace(methods=(StructuredPruning(rank=1, scope="uniform"),))
