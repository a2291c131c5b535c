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
