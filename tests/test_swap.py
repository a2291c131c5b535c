"""From a dense checkpoint to a CoDA model: strict, and the same function at reduction 1."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.checkpoints import load_hf, save_hf, swap_in
from coda_jax.conditional import CodaConfig
from coda_jax.network import Transformer

GOLDEN = Path(__file__).parent / "golden"


def coda_config(config, **coda):
    return dataclasses.replace(
        config, adapter=AdapterConfig(bottleneck=4), coda=CodaConfig(**coda) if coda else None
    )


@pytest.mark.parametrize("name", ["v1_1", "v1_0"])
@pytest.mark.parametrize("routing", ["soft_topk", "truncation"])
def test_reduction_1_with_fresh_adapters_is_the_dense_model(name, routing):
    config, base = load_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "logits.npz")
    swapped = coda_config(config, reduction=1, routing=routing)
    params = swap_in(base, swapped, jax.random.key(0))
    tokens = [golden[key] for key in ("encoder", "decoder_inputs", "decoder_targets")]
    dense, adapted = (
        Transformer(c).apply({"params": p}, *tokens, enable_dropout=False)
        for c, p in ((config, base), (swapped, params))
    )
    np.testing.assert_allclose(adapted, dense, rtol=1e-5, atol=1e-5)


def test_only_new_leaves_are_created_and_the_base_is_used_as_it_is():
    config, base = load_hf(GOLDEN / "v1_1")
    params = params_lib.flatten(swap_in(base, coda_config(config, reduction=3), jax.random.key(0)))
    flat_base = params_lib.flatten(base)
    created = params.keys() - flat_base.keys()
    stacks = [f"{stack}/layers_{i}" for stack in ("encoder", "decoder") for i in range(2)]
    expected = {f"{s}/adapter/{w}/kernel" for s in stacks for w in ("wi", "wo")}
    assert created == expected | {f"encoder/layers_{i}/router/kernel" for i in range(2)}
    assert all(params[path] is leaf for path, leaf in flat_base.items())
    assert params["encoder/layers_0/adapter/wi/kernel"].shape == (24, 4)


def test_created_leaves_are_the_models_own_initialisation_in_float32():
    config, base = load_hf(GOLDEN / "v1_1")
    config = dataclasses.replace(coda_config(config, reduction=3), dtype=jnp.bfloat16)
    tokens = jnp.ones((1, 6), jnp.int32)
    fresh = Transformer(config).init(
        jax.random.key(7), tokens, tokens, tokens, enable_dropout=False
    )["params"]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    params = params_lib.flatten(swap_in(half, config, jax.random.key(7)))
    _, new = params_lib.split_new(fresh)
    for path, leaf in params_lib.flatten(new).items():
        assert params[path].dtype == jnp.float32
        np.testing.assert_allclose(params[path], leaf, rtol=1e-6, err_msg=path)
    assert params["token_embedder/embedding"].dtype == jnp.bfloat16
    downs = [leaf for path, leaf in params.items() if path.endswith("adapter/wi/kernel")]
    assert all(np.any(leaf) for leaf in downs) and not np.array_equal(downs[0], downs[1])


def test_network_object_is_accepted_in_place_of_its_config():
    config, base = load_hf(GOLDEN / "v1_1")
    config = coda_config(config, reduction=2)
    first = swap_in(base, config, jax.random.key(1))
    second = swap_in(base, Transformer(config), jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    with pytest.raises(TypeError, match="T5Config"):
        swap_in(base, "v1_1", jax.random.key(1))


def test_every_wrong_base_leaf_is_listed():
    config, base = load_hf(GOLDEN / "v1_1")
    flat = params_lib.flatten(base)
    del flat["encoder/encoder_norm/scale"]
    flat["encoder/layers_1/mlp/wo/kernel"] = np.zeros((3, 3), np.float32)
    flat["encoder/layers_2/mlp/wo/kernel"] = np.zeros((40, 24), np.float32)
    with pytest.raises(ValueError) as error:
        swap_in(params_lib.unflatten(flat), coda_config(config, reduction=3), jax.random.key(0))
    text = str(error.value)
    assert "3 leaves" in text and "missing: encoder/encoder_norm/scale (24,)" in text
    assert "wrong shape: encoder/layers_1/mlp/wo/kernel is (3, 3), expected (40, 24)" in text
    assert "extra: encoder/layers_2/mlp/wo/kernel (40, 24)" in text


def test_a_base_that_is_already_swapped_is_refused():
    config, base = load_hf(GOLDEN / "v1_1")
    config = coda_config(config, reduction=3)
    params = swap_in(base, config, jax.random.key(0))
    with pytest.raises(ValueError, match="encoder/layers_1/router/kernel"):
        swap_in(params, config, jax.random.key(0))


def test_dense_config_creates_nothing():
    config, base = load_hf(GOLDEN / "v1_1")
    params = swap_in(base, config, jax.random.key(0))
    assert params_lib.flatten(params).keys() == params_lib.flatten(base).keys()


def test_adapters_are_not_saved_in_the_dense_layout(tmp_path):
    config, base = load_hf(GOLDEN / "v1_1")
    config = coda_config(config, reduction=3)
    params = swap_in(base, config, jax.random.key(0))
    with pytest.raises(ValueError, match=r"(?s)save_adapter.*decoder/layers_0/adapter/wi/kernel"):
        save_hf(tmp_path / "new", config, params)
    assert not (tmp_path / "new").exists()
    dense, _ = params_lib.split_new(params)
    save_hf(tmp_path / "new", config, dense)
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "new")[1], base)
