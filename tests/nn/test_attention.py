"""Attention against loops in numpy, and the buckets of positions against the original code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from coda_jax.nn import attention

# The smallest distance in each bucket of 32 with a limit of 128, worked out in whole numbers.
FIRST_OF_BUCKET_BOTH_WAYS = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
FIRST_OF_BUCKET_ONE_WAY = [
    *range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113,
]  # fmt: skip
DISTANCES = np.arange(-600, 601)


def first_distances(num_buckets, max_distance):
    """Returns the first distance of each one-way bucket, in exact integer arithmetic.

    Bucket `exact + j` begins where `log(d / exact) / log(max_distance / exact) >= j / rest`.
    """
    exact = num_buckets // 2
    rest = num_buckets - exact

    def begins(d, j):
        return d**rest * exact**j >= exact**rest * max_distance**j

    firsts = [next(d for d in range(exact, 10**6) if begins(d, j)) for j in range(rest)]
    return [*range(exact), *firsts]


def test_golden_tables_are_the_formula():
    assert first_distances(16, 128) == FIRST_OF_BUCKET_BOTH_WAYS
    assert first_distances(32, 128) == FIRST_OF_BUCKET_ONE_WAY


def test_buckets_equal_the_golden_tables():
    past = np.maximum(-DISTANCES, 0)
    one_way = np.searchsorted(FIRST_OF_BUCKET_ONE_WAY, past, side="right") - 1
    np.testing.assert_array_equal(
        attention.relative_position_bucket(DISTANCES, False, 32, 128), one_way
    )
    both_ways = np.searchsorted(FIRST_OF_BUCKET_BOTH_WAYS, abs(DISTANCES), side="right") - 1
    both_ways += 16 * (DISTANCES > 0)
    np.testing.assert_array_equal(
        attention.relative_position_bucket(DISTANCES, True, 32, 128), both_ways
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (8, 16), (64, 256)])
def test_buckets_equal_hugging_face(bidirectional, sizes):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    expected = modeling.T5Attention._relative_position_bucket(
        torch.arange(-600, 601), bidirectional, *sizes
    )
    np.testing.assert_array_equal(
        attention.relative_position_bucket(DISTANCES, bidirectional, *sizes), expected.numpy()
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_t5x(bidirectional):
    t5x_layers = pytest.importorskip(
        "t5x.examples.t5.layers", reason="T5X is not installed", exc_type=ImportError
    )
    expected = t5x_layers.RelativePositionBiases._relative_position_bucket(
        DISTANCES, bidirectional, 32, 128
    )
    np.testing.assert_array_equal(
        attention.relative_position_bucket(DISTANCES, bidirectional, 32, 128), expected
    )


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_is_looked_up_by_true_position(bidirectional, rng):
    """Queries and keys are any ascending choice of positions, some farther apart than the limit."""
    table = rng.normal(size=(3, 8)).astype(np.float32)
    queries = np.sort(rng.choice(60, (2, 5)), axis=-1)
    keys = np.sort(rng.choice(60, (2, 7)), axis=-1)
    module = attention.RelativePositionBiases(8, 16, 3, bidirectional)
    bias = module.apply(
        {"params": {"rel_embedding": table}}, jnp.asarray(queries), jnp.asarray(keys)
    )
    assert bias.shape == (2, 3, 5, 7)
    for b in range(2):
        for q in range(5):
            for j in range(7):
                distance = np.array(keys[b, j] - queries[b, q])
                bucket = attention.relative_position_bucket(distance, bidirectional, 8, 16)
                np.testing.assert_array_equal(bias[b, :, q, j], table[:, bucket])


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


@pytest.mark.parametrize("num_queries", [5, 8, 9, 11])
@pytest.mark.parametrize("biased", ["each", "all", "not"])
def test_blocks_of_queries_are_attended_to_as_all_are(num_queries, biased, rng, monkeypatch):
    """Blocks of 4 queries and less, of which the last one may overlap the one before."""
    monkeypatch.setattr(attention, "_CACHED_LOGITS", 4 * 2 * 7)
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

    found = with_gradients(jax.jit(attention.attend))
    expected = with_gradients(functools.partial(attention._attend, float32_logits=False))
    np.testing.assert_allclose(attention.attend(*given), found[1], atol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected
    )


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("num_queries", [5, 50])  # which TPUs take in one product, and do not
def test_attend_equals_numpy(num_queries, rng):
    query = rng.normal(size=(2, num_queries, 3, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 7, 3, 4)).astype(np.float32)
    bias = rng.normal(size=(2, 3, num_queries, 7)).astype(np.float32)
    mask = rng.random((2, num_queries, 7)) < 0.6
    mask[0, 2] = False
    heads_first = (jnp.asarray(x).swapaxes(1, 2) for x in (query, key, value))
    found = attention.attend(*heads_first, jnp.asarray(bias), jnp.asarray(mask[:, None]))
    found = found.swapaxes(1, 2)
    np.testing.assert_allclose(found, numpy_attention(query, key, value, bias, mask), atol=1e-5)
    # A query that may see no key gets the mean of the values.
    np.testing.assert_allclose(found[0, 2], value[0].mean(0), atol=1e-5)
    assert (mask.sum(-1) > 0).sum() > 5


@pytest.mark.usefixtures("branches")
def test_float32_logits_keep_what_bfloat16_would_lose(rng):
    query, key, value = jnp.asarray(rng.normal(size=(3, 1, 1, 64, 64)), jnp.bfloat16)
    exact = attention.attend(*(x.astype(jnp.float32) for x in (query, key, value)), None, None)
    precise = attention.attend(query, key, value, None, None, float32_logits=True)
    coarse = attention.attend(query, key, value, None, None)
    assert precise.dtype == coarse.dtype == jnp.bfloat16
    errors = [np.abs(np.float32(x) - exact).mean() for x in (precise, coarse)]
    assert errors[0] < errors[1] / 2


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


def test_query_kernel_starts_small_enough_for_unscaled_logits():
    """Logits of unit-scale inputs have unit scale although T5 does not divide by sqrt(head_dim)."""
    module = attention.Attention(2, 64)
    x = jax.random.normal(jax.random.key(0), (1, 64, 128))
    params = module.init(
        jax.random.key(1),
        x,
        deterministic=True,
        method=lambda m, x, deterministic: m(x, m.keys_values(x), deterministic=deterministic),
    )["params"]
    q = (x @ params["query"]["kernel"]).reshape(1, 64, 2, 64)
    k = (x @ params["key"]["kernel"]).reshape(1, 64, 2, 64)
    assert 0.8 < float(jnp.einsum("bqhd,blhd->bhql", q, k).std()) < 1.25
