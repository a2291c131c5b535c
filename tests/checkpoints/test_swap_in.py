"""From a dense checkpoint to an adapted model: strict, and the base is used as it is."""

from helpers import ADAPTER, GOLDEN, TINY, TINY_SPEECH, logits, random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.checkpoints import load_hf, save_hf, swap_in
from coda_jax.checkpoints.swap_in import add_head
from coda_jax.methods import Coda
from coda_jax.models import init_params

RNG = jax.random.key(0)
CODA = (Coda(reduction=3), ADAPTER)


@pytest.fixture(name="loaded", scope="module")
def fixture_loaded():
    """(config, base) of the golden checkpoint."""
    return load_hf(GOLDEN / "v1_1")


def test_reduction_1_with_fresh_adapters_is_the_dense_model():
    """Invariant 1, from a checkpoint whose embedding is also the output layer."""
    config, base = load_hf(GOLDEN / "v1_0")
    golden = np.load(GOLDEN / "v1_0" / "logits.npz")
    swapped = config.replace(methods=(Coda(reduction=1), ADAPTER))
    params = swap_in(swapped, base, RNG)
    tokens = [golden[key] for key in ("encoder", "decoder_inputs", "decoder_targets")]
    dense, adapted = logits(config, base, *tokens), logits(swapped, params, *tokens)
    np.testing.assert_allclose(adapted, dense, rtol=1e-5, atol=1e-5)


def test_only_new_leaves_are_created_and_the_base_is_used_as_it_is(loaded):
    config, base = loaded
    params = trees.flatten(swap_in(config.replace(methods=CODA), base, RNG))
    flat_base = trees.flatten(base)
    created = params.keys() - flat_base.keys()
    stacks = [f"{stack}/layers_{i}" for stack in ("encoder", "decoder") for i in range(2)]
    expected = {f"{s}/adapter/{w}/kernel" for s in stacks for w in ("wi", "wo")}
    assert created == expected | {f"encoder/layers_{i}/router/kernel" for i in range(2)}
    assert all(params[path] is leaf for path, leaf in flat_base.items())
    assert params["encoder/layers_0/adapter/wi/kernel"].shape == (24, 4)


@pytest.mark.all
def test_created_leaves_are_the_models_own_initialisation_in_float32():
    config = TINY.replace(num_encoder_layers=1, methods=CODA, dtype=jnp.bfloat16)
    base = random_params(config.dense())
    fresh = jax.jit(init_params, static_argnums=0)(config, jax.random.key(7))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    params = trees.flatten(swap_in(config, half, jax.random.key(7)))
    new, _ = trees.split(fresh, methods.created(config))
    for path, leaf in trees.flatten(new).items():
        assert params[path].dtype == jnp.float32
        np.testing.assert_allclose(params[path], leaf, rtol=1e-6, err_msg=path)
    assert params["token_embedder/embedding"].dtype == jnp.bfloat16
    downs = [
        np.asarray(leaf) for path, leaf in params.items() if path.endswith("adapter/wi/kernel")
    ]
    assert np.any(downs[0]) and not np.array_equal(downs[0], downs[1])


def test_every_wrong_base_leaf_is_listed(loaded):
    config, base = loaded
    flat = trees.flatten(base)
    del flat["encoder/encoder_norm/scale"]
    flat["encoder/layers_1/mlp/wo/kernel"] = np.zeros((3, 3), np.float32)
    flat["encoder/layers_2/mlp/wo/kernel"] = np.zeros((40, 24), np.float32)
    with pytest.raises(ValueError) as error:
        swap_in(config.replace(methods=CODA), trees.unflatten(flat), RNG)
    text = str(error.value)
    assert "3 leaves" in text and "missing: encoder/encoder_norm/scale (24,)" in text
    assert "wrong shape: encoder/layers_1/mlp/wo/kernel is (3, 3), expected (40, 24)" in text
    assert "extra: encoder/layers_2/mlp/wo/kernel (40, 24)" in text


def test_a_base_that_is_already_swapped_is_refused(loaded):
    config = loaded[0].replace(methods=CODA)
    with pytest.raises(ValueError, match=r"not dense; (.*\n)+  encoder/layers_1/router/kernel"):
        swap_in(config, random_params(config), RNG)


def test_a_dense_config_creates_nothing(loaded):
    config, base = loaded
    params = swap_in(config, base, RNG)
    assert trees.flatten(params).keys() == trees.flatten(base).keys()


def test_a_base_without_a_head_gets_one():
    config = TINY_SPEECH.replace(methods=CODA)
    encoder = random_params(TINY_SPEECH)["encoder"]
    params = swap_in(config, {"encoder": encoder}, RNG)
    assert params["ctc_head"]["kernel"].shape == (16, 20)
    with pytest.raises(ValueError, match="missing: encoder/layers_0/router/kernel"):
        add_head(config, {"encoder": encoder}, RNG)


def test_leaves_of_a_method_are_not_saved_in_the_dense_layout(loaded, tmp_path):
    config = loaded[0].replace(methods=CODA)
    params = random_params(config)
    with pytest.raises(ValueError, match=r"(?s)save_adapter.*decoder/layers_0/adapter/wi/kernel"):
        save_hf(tmp_path / "new", config, params)
    assert not (tmp_path / "new").exists()
    _, dense = trees.split(params, methods.created(config))
    save_hf(tmp_path / "new", config, dense)
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "new")[1], dense)
