"""LoRA, beside what the contract tests check for every method."""

from flax import linen as nn
from helpers import TINY, random_params, random_tokens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import checkpoints, methods, trees
from coda_jax.methods import Coda, Lora, ParallelAdapter, PrefixTuning
from coda_jax.methods.base import applied_to_modules
from coda_jax.methods.lora import resizing
from coda_jax.models import init_params, param_shapes
from coda_jax.nn.layers import Dense
from coda_jax.objectives import model_for


class Projections(nn.Module):
    """Two projections, of which the pattern of the tests names one."""

    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        query = Dense(5, ("embed", "joined_kv"), use_bias=self.use_bias, name="query")
        key = Dense(5, ("embed", "joined_kv"), name="key")
        return query(x), key(x)


class Stack(nn.Module):
    """A layer with the projections."""

    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        return Projections(self.use_bias, name="layers_0")(x)


def test_target_is_the_product_plus_a_scaled_thin_one(rng):
    """Equation 5, in float64 by hand; what is no target stays as it is."""
    lora = Lora(rank=2, alpha=3.0, targets=("query$",))
    x = rng.normal(size=(2, 4, 7)).astype(np.float32)
    with applied_to_modules((lora,)):
        params = Stack().init(jax.random.key(0), x)["params"]["layers_0"]
        assert {path: leaf.shape for path, leaf in trees.flatten(params).items()} == {
            "key/kernel": (7, 5),
            "query/kernel": (7, 5),
            "query/lora_a": (7, 2),
            "query/lora_b": (2, 5),
        }
        assert not params["query"]["lora_b"].any()
        a = params["query"]["lora_a"]
        assert (np.abs(a) <= 7**-0.5).all() and np.unique(a).size == a.size
        params["query"]["lora_b"] = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
        query, key = Stack().apply({"params": {"layers_0": params}}, x)
    w, a, b = (np.asarray(params["query"][n], np.float64) for n in ("kernel", "lora_a", "lora_b"))
    np.testing.assert_allclose(query, x @ w + 3.0 / 2 * (x @ a @ b), atol=1e-5)
    np.testing.assert_allclose(key, x @ np.asarray(params["key"]["kernel"]), atol=1e-5)


@pytest.mark.parametrize("use_bias", [False, True])
def test_dora_resizes_the_columns(rng, use_bias):
    """V (|W| + m) / |V|, V = W + s A B, s = alpha / sqrt(rank), in float64; and its start."""
    dora = Lora(4, alpha=3.0, targets=("query$",), rank_stabilized=True, weight_decomposed=True)
    module = Stack(use_bias)
    x = rng.normal(size=(2, 4, 7)).astype(np.float32)
    with applied_to_modules((dora,)):
        params = module.init(jax.random.key(0), x)["params"]
        start, _ = module.apply({"params": params}, x)
        np.testing.assert_allclose(start, x @ params["layers_0"]["query"]["kernel"], atol=1e-5)
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
        found, _ = module.apply({"params": params}, x)
    params = params["layers_0"]["query"]
    names = ("kernel", "lora_a", "lora_b", "lora_magnitude")
    w, a, b, m = (np.asarray(params[name], np.float64) for name in names)
    v = w + 3.0 / 2 * (a @ b)
    v *= (np.linalg.norm(w, axis=0) + m) / np.linalg.norm(v, axis=0)
    np.testing.assert_allclose(found, x @ v + params.get("bias", 0), atol=1e-5)


def test_columns_of_zeros_give_numbers(rng):
    """Of a base that was pruned, say."""
    w, a, b = np.zeros((7, 5)), rng.normal(size=(7, 2)), np.zeros((2, 5))
    values, gradient = jax.value_and_grad(lambda b: resizing(w, a, b, jnp.zeros(5)).sum())(b)
    assert np.isfinite(values) and np.isfinite(gradient).all()


def test_default_targets_are_queries_and_values_of_every_attention():
    """The decoder's and the cross-attention's too, as peft's are."""
    config = TINY.replace(methods=(Lora(rank=3),))
    dense = init_params(config.dense(), jax.random.key(0))
    trained, _ = methods.partition(config, checkpoints.swap_in(config, dense, jax.random.key(1)))
    modules = {path.rpartition("/")[0] for path in trees.flatten(trained)}
    attentions = ["encoder/layers_0/attention", "encoder/layers_1/attention"]
    attentions += [f"decoder/layers_0/{a}" for a in ("self_attention", "encoder_decoder_attention")]
    assert modules == {f"{a}/{name}" for a in attentions for name in ("query", "value")}


def test_a_token_that_is_not_routed_gets_no_update(rng):
    """LoRA is inside the frozen layer, which such a token skips."""
    config = TINY.replace(methods=(Coda(reduction=4), Lora(rank=2)))
    params = random_params(config)
    tokens = random_tokens(rng, [12], 12)
    without = {p: leaf * ("lora_b" not in p) for p, leaf in trees.flatten(params).items()}
    # One layer, so that what is not selected is the embedding as it came.
    model = model_for(config.replace(num_encoder_layers=1))
    keep = {p: x for p, x in trees.flatten(params).items() if "encoder/layers_1" not in p}
    bare = {p: x for p, x in without.items() if "encoder/layers_1" not in p}
    routed = jax.jit(model.routing)(trees.unflatten(keep), tokens)[0, 0] > 0
    encode = jax.jit(model.encode)
    found = encode(trees.unflatten(keep), tokens)
    plain = encode(trees.unflatten(bare), tokens)
    changed = np.abs(np.asarray(found - plain))[0].max(-1) > 1e-6
    assert changed.tolist() == np.asarray(routed).tolist() and routed.sum() == 3


def test_merge_keeps_the_dtype_of_the_base_and_the_other_methods(rng):
    config = TINY.replace(methods=(Lora(rank=2), ParallelAdapter(4)))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    merged_config, merged = methods.merge(config, params)
    assert merged_config.methods == (ParallelAdapter(4),)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    path = "encoder/layers_0/attention/query/kernel"
    before, after = trees.flatten(params)[path], trees.flatten(merged)[path]
    assert not np.array_equal(before, after)


def test_neither_other_methods_nor_what_is_outside_the_layers_is_updated():
    every = Lora(rank=2, targets=(".*",))
    config = TINY.replace(methods=(every, Coda(2.0), ParallelAdapter(4), PrefixTuning(3, hidden=4)))
    updated = {path for path in trees.flatten(param_shapes(config)) if path.endswith("/lora_a")}
    places = [place for stack in ("encoder", "decoder") for place in config.places(stack)]
    assert updated == {f"{x.path}/{p.path}/lora_a" for x in places for p in config.projections(x)}
    with pytest.raises(ValueError, match=r"\['prefix/wo\$'\] match no projection"):
        config.replace(methods=(Lora(rank=2, targets=("prefix/wo$",)), PrefixTuning(3, hidden=4)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, r"Lora\.rank must be .* at least 1, got 0"),
        ({"rank": 17}, r"Lora\.rank=17 is above the width 16 of encoder/layers_0/attention/query"),
        ({"alpha": 0.0}, r"Lora\.alpha must be .* above 0, got 0\.0"),
        ({"targets": ("atention/query",)}, r"\['atention/query'\] match no projection; there are"),
        ({"targets": ()}, r"Lora\.targets must be a tuple that is not empty"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(methods=(Lora(**options),))
