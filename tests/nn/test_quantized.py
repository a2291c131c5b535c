"""int8 matrices: how they are rounded, and products with them, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.nn import layers, quantized
from coda_jax.nn.quantized import Quantized, product_of_rows


def made(rng, shape, axis=0):
    """(a matrix, the same as int8)."""
    w = rng.normal(size=shape).astype(np.float32)
    return w, quantized.quantized(w, axis, "origin")


@pytest.mark.parametrize("axis", [0, 1])
def test_each_output_has_the_largest_scale_that_loses_nothing(rng, axis):
    w, _ = made(rng, (7, 5))
    w[:, 2] *= 1000
    w[3] *= 1e-6
    w[:, 4] = 0
    w[0, 0] = np.float32(1e-45)  # the smallest there is
    found = quantized.quantized(w, axis, "origin")
    assert found.values.dtype == np.int8 and found.scale.dtype == np.float32
    largest = np.abs(w.astype(np.float64)).max(axis=axis, keepdims=True)
    np.testing.assert_allclose(found.scale, np.where(largest > 0, largest / 127, 1), rtol=1e-6)
    with np.errstate(divide="raise", invalid="raise"):
        nothing = quantized.quantized(np.full((2, 2), 1e-45, np.float32), axis, "origin")
    assert not nothing.values.any()
    exact = np.rint(w / found.scale.astype(np.float64))
    assert np.abs(found.values - exact).max() <= 1 and np.abs(found.values).max() == 127
    error = np.abs(found.values * found.scale.astype(np.float64) - w)
    assert (error <= 0.5001 * found.scale).all()


def test_it_is_read_as_the_matrix_that_it_stands_for(rng):
    w, found = made(rng, (6, 4))
    expected = found.values.astype(np.float32) * found.scale
    for array in (np.asarray(found), jnp.asarray(found), jnp.sqrt(found) ** 2, found.astype("f")):
        assert array.dtype == found.dtype and array.shape == found.shape == w.shape
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(jnp.asarray(found), expected)
    assert np.asarray(found, np.float64).dtype == np.float64
    assert found.size == 24 and found.nbytes == 24 + 16 and found.ndim == 2


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [4, 24, 2**19])  # elements: blocks of 1 row, of 4, and all
def test_products_of_rows_are_numpys(rng, monkeypatch, transposed, block):
    monkeypatch.setattr(quantized, "_BLOCK", block)
    monkeypatch.setattr(quantized, "_LEAST", 1)
    _, w = made(rng, (12, 6))
    x = rng.normal(size=(3, 6 if transposed else 12)).astype(np.float32)
    values = w.values.T if transposed else w.values
    found = jax.jit(lambda x, w: product_of_rows(x, w, transposed))(x, w.values)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, x.astype(np.float64) @ values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((768, 768), 384),
        ((768, 2048), 256),
        ((2048, 768), 512),
        ((768, 32128), 16),
        ((32128, 768), 502),
        ((64, 64), 64),  # fits as a whole
        ((32003, 768), 32003),  # a prime number: blocks of a row would be tiny
    ],
)
def test_blocks_divide_a_matrix_and_fit_the_cache(shape, rows):
    assert quantized._rows_of_block(shape) == rows


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("length", [1, 5])
def test_a_projection_gives_the_product_and_its_gradient(rng, dtype, length):
    _, w = made(rng, (16, 12))
    module = layers.Dense(12, ("embed", "mlp"), dtype=dtype, output_heads=3)
    x = rng.normal(size=(2, length, 16)).astype(dtype)
    weights = rng.normal(size=(2, length, 12)).astype(dtype)

    def product(x, kernel):
        return module.apply({"params": {"kernel": kernel}}, x)

    found, pull = jax.jit(lambda x: jax.vjp(lambda x: product(x, w), x))(x)
    expected = np.asarray(x, np.float64) @ np.asarray(w)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=0.05)
    (gradient,) = pull(weights)
    expected = np.asarray(weights, np.float64) @ np.asarray(w).T
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=0.03, atol=0.05)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == w.shape]
    assert {leaf.dtype for leaf in kept} == {np.dtype(np.int8)}  # no float matrix until then


def test_a_projection_of_bfloat16_may_have_float32_outputs(rng):
    """As the output layer has: values of int8 are exact in bfloat16."""
    _, w = made(rng, (16, 12))
    x = rng.normal(size=(2, 3, 16)).astype(jnp.bfloat16)
    module = layers.Dense(12, ("embed", "vocab"))
    found = module.apply({"params": {"kernel": w}}, x)
    assert found.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(w)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "length"), [(2, 1), (2, 3), (1, 1)])
def test_a_table_is_looked_up_and_is_the_output_layer(rng, rows, length):
    _, table = made(rng, (10, 8), axis=1)
    module = layers.Embed(10, 8)
    tokens = rng.integers(0, 10, (rows, length))
    w = np.asarray(table)
    found = module.apply({"params": {"embedding": table}}, tokens)
    np.testing.assert_array_equal(found, w[tokens])
    x = rng.normal(size=(rows, length, 8)).astype(np.float32)
    logits = module.apply({"params": {"embedding": table}}, x, method="attend")
    np.testing.assert_allclose(logits, x.astype(np.float64) @ w.T, rtol=1e-4, atol=1e-5)
    beyond = module.apply({"params": {"embedding": table}}, np.array([[10]]))
    assert np.isnan(beyond).all()  # as of a table of floats


@pytest.mark.parametrize("length", [1, 64])
def test_a_cpu_makes_no_float_matrix(length):
    """But blocks of one: not of all layers as soon as a program starts either."""
    layer = Quantized(np.zeros((768, 768), np.int8), np.ones((1, 768), np.float32))
    x = np.zeros((4, length, 768), np.float32)

    def step(x, ws):
        for w in ws:
            x = layers.product_of_quantized(x, w, jnp.float32)
        return x

    sizes = jax.jit(step).lower(x, [layer] * 8).compile().memory_analysis()
    assert sizes.temp_size_in_bytes < 1.5 * 4 * layer.size + 4 * x.nbytes
