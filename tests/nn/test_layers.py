"""Projections, norms, embeddings and feed-forward blocks against plain numpy."""

from helpers import gelu, random_tokens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.nn import layers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "features"),
    [(4, 48, 40), (4, 48, 5000), (1, 48, 40), (4, 40, 8)],  # blocks; too wide; one row; no blocks
)
def test_the_product_of_one_token_equals_numpy(rows, inputs, features, dtype, rng):
    x = jnp.asarray(rng.normal(size=(rows, 1, inputs)), dtype)
    kernel = jnp.asarray(rng.normal(size=(inputs, features)), dtype)
    found = jax.jit(layers.product)(x, kernel)
    assert found.dtype == dtype
    expected = np.float64(x) @ np.float64(kernel)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.float64(found), expected, rtol=tolerance, atol=5 * tolerance)
    ways = [layers._whole_product, layers._blocked_product][: 1 + (inputs % layers._BLOCK == 0)]
    for way in ways:
        found = np.float64(way(x[:, 0], kernel))
        np.testing.assert_allclose(found, expected[:, 0], atol=5 * tolerance)


@pytest.mark.parametrize("held", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16])
def test_a_float32_projection_is_exact_however_its_kernel_is_held(given, held, rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 8)), given)
    kernel = jnp.asarray(rng.normal(size=(8, 5)), held)
    dense = layers.Dense(5, ("embed", "mlp"))
    expected = np.float64(x) @ np.float64(kernel)
    found = dense.apply({"params": {"kernel": kernel}}, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    norm = layers.RMSNorm().apply({"params": {"scale": jnp.ones(8)}}, x)
    found = dense.apply({"params": {"kernel": kernel}}, norm)
    np.testing.assert_allclose(
        found, np.float64(norm.array()) @ np.float64(kernel), rtol=1e-5, atol=1e-5
    )


def test_norms_equal_numpy(rng):
    x = rng.normal(size=(2, 3, 8)) * 5 + 2
    scale, bias = rng.normal(size=(2, 8))
    for epsilon in (1e-6, 0.5):
        found = layers.RMSNorm(epsilon).apply({"params": {"scale": scale}}, x).array()
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        found = layers.LayerNorm(epsilon).apply({"params": {"scale": scale, "bias": bias}}, x)
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        np.testing.assert_allclose(found, expected * scale + bias, rtol=1e-4, atol=1e-5)


def test_rms_norm_squares_in_float32():
    """256 entries of 1 and one of 100: summed in bfloat16, the ones would vanish in part."""
    x = jnp.concatenate([jnp.full(1, 100.0), jnp.ones(511)]).astype(jnp.bfloat16)
    found = layers.RMSNorm(dtype=jnp.bfloat16).apply({"params": {"scale": jnp.ones(512)}}, x)
    found = found.array()
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(found), np.float32(x) / np.sqrt((100**2 + 511) / 512), rtol=4e-3
    )


def test_zero_row_stays_finite_in_rms_norm():
    norm = layers.RMSNorm()

    def total(x):
        return norm.apply({"params": {"scale": jnp.ones(4)}}, x).array().sum()

    value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 4)))
    assert value == 0 and np.isfinite(gradient).all()


def test_a_scaled_product_is_that_of_the_norm(rng):
    """The order of multiplication that TPUs take, its values and its gradients."""
    x = jnp.asarray(rng.normal(size=(2, 3, 16)) * 4, jnp.bfloat16)
    scale = jnp.asarray(rng.uniform(0.5, 2, 16), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(16, 12)), jnp.bfloat16)
    cotangent = jnp.asarray(rng.normal(size=(2, 3, 12)), jnp.bfloat16)

    def normalized(x, scale):
        norm = layers.RMSNorm(dtype=jnp.bfloat16)
        return norm.apply({"params": {"scale": scale}}, x)

    def early(x, scale, kernel):
        return normalized(x, scale).array() @ kernel

    for heads in ((1, 4), (4, 1)):

        def late(x, scale, kernel, heads=heads):
            return layers._scaled_product(heads, normalized(x, scale), kernel)

        (found, pull), (expected, pull_early) = (
            jax.vjp(f, x, scale, kernel) for f in (late, early)
        )
        np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=0.02, atol=0.05)
        for gradient, by_norm in zip(pull(cotangent), pull_early(cotangent), strict=True):
            assert gradient.dtype == by_norm.dtype
            np.testing.assert_allclose(
                np.float32(gradient), np.float32(by_norm), rtol=0.02, atol=0.02
            )


def test_products_of_one_input_stay_apart_on_gpus(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 16)), jnp.bfloat16)
    kernels = jnp.asarray(rng.normal(size=(2, 16, 8)), jnp.bfloat16)
    for kernel in kernels:
        found, pull = jax.vjp(layers._product_alone, x, kernel)
        expected, expected_pull = jax.vjp(jnp.matmul, x, kernel)
        np.testing.assert_array_equal(found, expected)
        jax.tree.map(np.testing.assert_array_equal, pull(expected), expected_pull(expected))
    both = jax.jit(lambda x, kernels: [layers.product(x, kernel) for kernel in kernels])
    text = both.trace(x, kernels).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("optimization_barrier") == 2


def test_mlp_equals_numpy(rng):
    x = rng.normal(size=(2, 3, 6))
    wi_0, wi_1 = rng.normal(size=(2, 6, 10))
    wo = rng.normal(size=(10, 6))
    gated = layers.MlpBlock(10, ("gelu", "linear")).apply(
        {"params": {"wi_0": {"kernel": wi_0}, "wi_1": {"kernel": wi_1}, "wo": {"kernel": wo}}},
        jnp.asarray(x),
        deterministic=True,
    )
    np.testing.assert_allclose(gated, (gelu(x @ wi_0) * (x @ wi_1)) @ wo, atol=1e-4, rtol=1e-4)
    plain = layers.MlpBlock(10, ("relu",)).apply(
        {"params": {"wi": {"kernel": wi_0}, "wo": {"kernel": wo}}},
        jnp.asarray(x),
        deterministic=True,
    )
    np.testing.assert_allclose(plain, np.maximum(x @ wi_0, 0) @ wo, atol=1e-4, rtol=1e-4)


def test_embedding_and_its_transpose(rng):
    table = rng.normal(size=(11, 5)).astype(np.float32)
    tokens = random_tokens(rng, [4, 2], 4, vocab_size=11)
    module = layers.Embed(11, 5, dtype=jnp.bfloat16)
    params = {"params": {"embedding": jnp.asarray(table)}}
    found = module.apply(params, jnp.asarray(tokens))
    np.testing.assert_array_equal(found, jnp.asarray(table[tokens], jnp.bfloat16))
    x = rng.normal(size=(2, 3, 5)).astype(np.float32)
    logits = module.apply(params, jnp.asarray(x), method="attend")
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, x @ table.T, atol=1e-5)
