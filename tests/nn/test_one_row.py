"""A product of one row on a TPU, against numpy, and as the compiler is given it."""

import math
import re

from helpers import as_on_tpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.nn import layers
from coda_jax.nn.quantized import quantized

INPUTS, FEATURES = 8, 5
PRODUCTS = {
    "product": layers.product,
    "product_in_float32": layers.product_in_float32,
    "product_of_quantized": lambda x, w: layers.product_of_quantized(
        x, quantized(w, 0, ""), jnp.float32
    ),
}


def rows_of_products(function, x):
    """The rows of the results of all products of a function."""
    with as_on_tpu():
        shapes = re.findall(r"\[([\d,]+)\] = dot_general", str(jax.make_jaxpr(function)(x)))
    return [math.prod(map(int, shape.split(",")[:-1])) for shape in shapes]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_tpu_gets_a_second_row_where_there_is_one(name, rows, rng):
    x = jnp.asarray(rng.normal(size=(rows, 1, INPUTS)), jnp.float32)
    w = rng.normal(size=(INPUTS, FEATURES)).astype(np.float32)

    def of_tpu(x):
        return PRODUCTS[name](x, w)

    assert rows_of_products(of_tpu, x) == [max(rows, 2)]
    exact = np.float64(quantized(w, 0, "") if "quantized" in name else w)
    expected = np.float64(x) @ exact
    with as_on_tpu():
        np.testing.assert_allclose(jax.jit(of_tpu)(x), expected, rtol=1e-5, atol=1e-5)
        one_each = jax.jit(jax.vmap(of_tpu))(x[:, None])[:, 0]
        gradient = jax.jit(jax.grad(lambda x: of_tpu(x).sum()))(x)
    np.testing.assert_allclose(one_each, expected, rtol=1e-5, atol=1e-5)
    of_x = np.broadcast_to(exact.sum(axis=1), x.shape)
    np.testing.assert_allclose(gradient, of_x, rtol=1e-5, atol=1e-5)


def test_one_row_may_have_any_rank(rng):
    x, w = rng.normal(size=INPUTS), rng.normal(size=(INPUTS, FEATURES))
    for shape in ((INPUTS,), (1, INPUTS), (1, 1, 1, INPUTS)):
        with as_on_tpu():
            found = layers.product_in_float32(x.reshape(shape), w)
        assert found.shape == (*shape[:-1], FEATURES)
        np.testing.assert_allclose(found.ravel(), x @ w, rtol=1e-5, atol=1e-5)
