"""Attention on every platform against loops in numpy."""

import functools
import itertools

from contract.programs import relative_error
from helpers import as_on_tpu, as_with_bfloat16
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from coda_jax.nn import attention, dot_product_attention


def numpy_attention(query, key, value, bias, mask):
    """Loops over examples, heads and queries; everything [B, tokens, H, head_dim]."""
    y = np.zeros(query.shape)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            for q in range(query.shape[1]):
                logits = key[b, :, h] @ query[b, q, h] + bias[b, h, q]
                logits = np.where(mask[b, q], logits, -1e10)
                y[b, q, h] = softmax(logits.astype(np.float64)) @ value[b, :, h]
    return y


@pytest.mark.parametrize(
    ("num_queries", "biased"),
    [
        (9, "each"),
        (11, "all"),
        (8, "not"),
        *(
            pytest.param(*case, marks=pytest.mark.all)
            for case in itertools.product([5, 8, 9, 11], ["each", "all", "not"])
        ),
    ],
)
def test_blocks_of_queries_are_attended_to_as_all_are(num_queries, biased, rng, monkeypatch):
    """Blocks of 4 queries and less, of which the last one may overlap the one before."""
    monkeypatch.setattr(dot_product_attention, "_CACHED_LOGITS", 4 * 7)
    monkeypatch.setattr(dot_product_attention, "_WORTH_A_ROUND", 0)
    query = rng.normal(size=(2, 3, num_queries, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 3, 7, 4)).astype(np.float32)
    bias = rng.normal(size=(2 if biased == "each" else 1, 3, num_queries, 7)).astype(np.float32)
    mask = rng.random((2, 1, num_queries if biased == "each" else 1, 7)) < 0.6
    mask[0, :, -1] = False
    given = (query, key, value, None if biased == "not" else bias, mask)

    def loss(attend, *given):
        y = attend(*given)
        return (y * jnp.arange(y.size).reshape(y.shape)).sum(), y

    def with_gradients(attend):
        return jax.grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True)(*given)

    found = with_gradients(jax.jit(dot_product_attention.attend))
    expected = with_gradients(
        functools.partial(dot_product_attention._attend, float32_logits=False)
    )
    np.testing.assert_allclose(dot_product_attention.attend(*given), found[1], atol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected
    )


def test_blocks_are_precise_in_bfloat16(rng, monkeypatch):
    """On a CPU that has such products, where nothing but the result is rounded to bfloat16."""
    monkeypatch.setattr(dot_product_attention, "_FEW_QUERIES", 0)
    monkeypatch.setattr(dot_product_attention, "_CACHED_LOGITS", 0)
    given = [jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(3, 2, 3, 80, 16))]

    def with_gradient(*given):
        def total(query):
            y = dot_product_attention.attend(query, *given[1:], None, None)
            return jnp.square(y.astype(jnp.float32)).sum(), y

        return jax.jit(jax.grad(total, has_aux=True))(given[0])

    expected_gradient, expected = with_gradient(*(x.astype(jnp.float32) for x in given))
    with as_with_bfloat16():
        gradient, found = with_gradient(*given)
    assert found.dtype == gradient.dtype == jnp.bfloat16
    assert relative_error(found, expected) < 0.005
    assert relative_error(gradient, expected_gradient) < 0.02


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("num_queries", [5, 50])  # which TPUs take in one product, and do not
def test_attend_equals_numpy(num_queries, rng):
    query = rng.normal(size=(2, num_queries, 3, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 7, 3, 4)).astype(np.float32)
    bias = rng.normal(size=(2, 3, num_queries, 7)).astype(np.float32)
    mask = rng.random((2, num_queries, 7)) < 0.6
    mask[0, 2] = False
    heads_first = (jnp.asarray(x).swapaxes(1, 2) for x in (query, key, value))
    found = dot_product_attention.attend(
        *heads_first, jnp.asarray(bias), jnp.asarray(mask[:, None])
    )
    found = found.swapaxes(1, 2)
    np.testing.assert_allclose(found, numpy_attention(query, key, value, bias, mask), atol=1e-5)
    # A query that may see no key gets the mean of the values.
    np.testing.assert_allclose(found[0, 2], value[0].mean(0), atol=1e-5)
    assert (mask.sum(-1) > 0).sum() > 5


CPU, CPU_WITH_BFLOAT16 = (functools.partial(as_with_bfloat16, has) for has in (False, True))


@pytest.mark.parametrize(
    ("processor", "num_queries", "num_keys", "always"),
    [
        pytest.param(CPU, 96, 192, False, id="cpu-few"),
        pytest.param(CPU, 192, 192, False, id="cpu-many"),
        pytest.param(CPU_WITH_BFLOAT16, 96, 192, True, id="cpu_with_bfloat16-few"),
        pytest.param(CPU_WITH_BFLOAT16, 192, 192, True, id="cpu_with_bfloat16-many"),
        pytest.param(as_on_tpu, 96, 192, True, id="tpu-few"),
        pytest.param(as_on_tpu, 192, 192, False, id="tpu-many"),
        pytest.param(as_on_tpu, 192, 512, True, id="tpu-whole-tiles"),
    ],
)
def test_float32_logits_keep_what_bfloat16_would_lose(
    processor, num_queries, num_keys, always, rng
):
    """And where they cost nothing, they are there without being asked for."""
    query, key, value = jnp.asarray(rng.normal(size=(3, 1, 1, num_keys, 64)), jnp.bfloat16)
    query = query[:, :, :num_queries]
    exact = dot_product_attention.attend(
        *(x.astype(jnp.float32) for x in (query, key, value)), None, None
    )
    with processor():
        precise = dot_product_attention.attend(query, key, value, None, None, float32_logits=True)
        plain = dot_product_attention.attend(query, key, value, None, None)
    assert precise.dtype == plain.dtype == jnp.bfloat16
    assert relative_error(precise, exact) < 0.004
    assert (relative_error(plain, exact) < 0.004) == always


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("with_source", [False, True])
def test_attention_equals_numpy_and_beams_share_keys(with_source, beams, rng):
    heads, width, head_dim, rows = 2, 6, 4, 2
    module = attention.Attention(heads, head_dim)
    x_q = rng.normal(size=(rows * beams, 5, width)).astype(np.float32)
    x_kv = rng.normal(size=(rows, 7, width)).astype(np.float32)
    mask = rng.random((rows, 7)) < 0.7
    kernels = {
        name: rng.normal(size=(width, heads * head_dim)).astype(np.float32)
        for name in ("query", "key", "value")
    }
    kernels["out"] = rng.normal(size=(heads * head_dim, width)).astype(np.float32)
    params = {"params": {name: {"kernel": kernel} for name, kernel in kernels.items()}}
    keys_values = module.apply(params, jnp.asarray(x_kv), method="keys_values")
    source = None
    if with_source:
        source = (jnp.asarray(x_kv), *module.apply(params, width, method="matrices"))
    found = module.apply(
        params, jnp.asarray(x_q), keys_values, mask[:, None, None], source=source,
        deterministic=True,
    )  # fmt: skip

    def split(x, name):
        x = np.repeat(x, len(x_q) // len(x), axis=0)
        return (x @ kernels[name]).reshape(*x.shape[:2], heads, head_dim)

    y = numpy_attention(
        split(x_q, "query"),
        split(x_kv, "key"),
        split(x_kv, "value"),
        np.zeros((rows * beams, heads, 5, 7)),
        np.repeat(mask, beams, axis=0)[:, None].repeat(5, axis=1),
    )
    expected = y.reshape(*x_q.shape[:2], -1) @ kernels["out"]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_a_query_that_sees_no_key_gets_the_mean_of_the_values(dtype, num_queries, branches, rng):
    """And no NaN, in any type: of an empty row, and of the padding of a packed one."""
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, 2, n, 4)), dtype) for n in (num_queries, 6, 6)
    )
    mask = np.zeros((2, 1, num_queries, 6), bool)
    mask[1, :, -1, :3] = True
    found = np.asarray(dot_product_attention.attend(query, key, value, None, mask), np.float32)
    expected = np.broadcast_to(np.asarray(value, np.float32).mean(2, keepdims=True), found.shape)
    np.testing.assert_allclose(found[0], expected[0], atol=0.02)
    np.testing.assert_allclose(found[1, :, :-1], expected[1, :, :-1], atol=0.02)
    assert np.isfinite(found).all()
