"""The bottleneck of adapters against plain numpy."""

from helpers import gelu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.nn.bottleneck import Bottleneck


@pytest.mark.parametrize(
    "activation, function",
    [("relu", lambda x: np.maximum(x, 0)), ("gelu", gelu), ("linear", np.array)],
)
def test_bottleneck_equals_numpy(activation, function, rng):
    x = rng.normal(size=(2, 3, 6))
    down, up = rng.normal(size=(6, 4)), rng.normal(size=(4, 6))
    found = Bottleneck(4, activation).apply(
        {"params": {"wi": {"kernel": down}, "wo": {"kernel": up}}}, jnp.asarray(x)
    )
    np.testing.assert_allclose(found, function(x @ down) @ up, atol=1e-5, rtol=1e-5)


def test_new_bottleneck_adds_nothing_but_can_learn(rng):
    x = jnp.asarray(rng.normal(size=(1, 3, 6)), jnp.float32)
    module = Bottleneck(4)
    params = module.init(jax.random.key(0), x)["params"]
    assert (np.asarray(module.apply({"params": params}, x)) == 0).all()
    gradient = jax.grad(lambda p: module.apply({"params": p}, x).sum())(params)
    assert np.asarray(gradient["wo"]["kernel"]).any()


def test_its_factors_are_there_where_a_sum_may_multiply_them(rng):
    """In bfloat16, of which the matrix comes out exactly."""
    x = jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.bfloat16)
    kernels = {"wi": rng.normal(size=(6, 4)), "wo": rng.normal(size=(4, 6))}
    params = {"params": {name: {"kernel": jnp.asarray(x)} for name, x in kernels.items()}}
    found = Bottleneck(4, dtype=jnp.bfloat16).apply(params, x, beside=True)
    np.testing.assert_array_equal(found.right, jnp.asarray(kernels["wo"], jnp.bfloat16))
    np.testing.assert_array_equal(found.array, Bottleneck(4, dtype=jnp.bfloat16).apply(params, x))
    product = np.float32(found.left) @ np.float32(found.right)
    np.testing.assert_allclose(np.float32(found.array), product, rtol=0.01, atol=0.01)
    assert Bottleneck(4).apply(params, x.astype(jnp.float32), beside=True).left is None
