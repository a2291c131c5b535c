"""The parts of a T5 layer against plain numpy, and the buckets against the original code."""

from helpers import random_tokens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from coda_jax import layers
from coda_jax.adapters import Adapter, AdapterConfig

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
        layers.relative_position_bucket(DISTANCES, False, 32, 128), one_way
    )
    both_ways = np.searchsorted(FIRST_OF_BUCKET_BOTH_WAYS, abs(DISTANCES), side="right") - 1
    both_ways += 16 * (DISTANCES > 0)
    np.testing.assert_array_equal(
        layers.relative_position_bucket(DISTANCES, True, 32, 128), both_ways
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
        layers.relative_position_bucket(DISTANCES, bidirectional, *sizes), expected.numpy()
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
        layers.relative_position_bucket(DISTANCES, bidirectional, 32, 128), expected
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_is_looked_up_by_true_position(bidirectional, rng):
    """Queries and keys are any ascending choice of positions, some farther apart than the limit."""
    table = rng.normal(size=(3, 8)).astype(np.float32)
    queries = np.sort(rng.choice(60, (2, 5)), axis=-1)
    keys = np.sort(rng.choice(60, (2, 7)), axis=-1)
    module = layers.RelativePositionBiases(8, 16, 3, bidirectional)
    bias = module.apply(
        {"params": {"rel_embedding": table}}, jnp.asarray(queries), jnp.asarray(keys)
    )
    assert bias.shape == (2, 3, 5, 7)
    for b in range(2):
        for q in range(5):
            for j in range(7):
                distance = np.array(keys[b, j] - queries[b, q])
                bucket = layers.relative_position_bucket(distance, bidirectional, 8, 16)
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


def test_attend_equals_numpy(rng):
    query = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 7, 3, 4)).astype(np.float32)
    bias = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    mask = rng.random((2, 5, 7)) < 0.6
    mask[0, 2] = False
    heads_first = (jnp.asarray(x).swapaxes(1, 2) for x in (query, key, value))
    found = layers.attend(*heads_first, jnp.asarray(bias), jnp.asarray(mask[:, None]))
    found = found.swapaxes(1, 2)
    np.testing.assert_allclose(found, numpy_attention(query, key, value, bias, mask), atol=1e-5)
    # A query that may see no key gets the mean of the values.
    np.testing.assert_allclose(found[0, 2], value[0].mean(0), atol=1e-5)
    assert (mask.sum(-1) > 0).sum() > 5


def test_float32_logits_keep_what_bfloat16_would_lose(rng):
    query, key, value = jnp.asarray(rng.normal(size=(3, 1, 1, 64, 64)), jnp.bfloat16)
    exact = layers.attend(*(x.astype(jnp.float32) for x in (query, key, value)), None, None)
    precise = layers.attend(query, key, value, None, None, float32_logits=True)
    coarse = layers.attend(query, key, value, None, None)
    assert precise.dtype == coarse.dtype == jnp.bfloat16
    errors = [np.abs(np.float32(x) - exact).mean() for x in (precise, coarse)]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("beams", [1, 3])
def test_attention_equals_numpy_and_beams_share_keys(beams, rng):
    heads, width, head_dim, rows = 2, 6, 4, 2
    module = layers.Attention(heads, head_dim)
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
    found = module.apply(
        params, jnp.asarray(x_q), keys_values, mask[:, None, None], deterministic=True
    )

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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "features"),
    [(4, 48, 40), (4, 48, 5000), (1, 48, 40), (4, 40, 8)],  # blocks; too wide; one row; no blocks
)
def test_the_product_of_one_token_equals_numpy(rows, inputs, features, dtype, rng):
    x = jnp.asarray(rng.normal(size=(rows, 1, inputs)), dtype)
    kernel = jnp.asarray(rng.normal(size=(inputs, features)), dtype)
    found = jax.jit(layers._product)(x, kernel)
    assert found.dtype == dtype
    expected = np.float64(x) @ np.float64(kernel)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.float64(found), expected, rtol=tolerance, atol=5 * tolerance)
    blocked = layers._blocked_product if inputs % layers._BLOCK == 0 else layers._product
    np.testing.assert_allclose(blocked(x, kernel).astype(float), expected, atol=5 * tolerance)


def test_query_kernel_starts_small_enough_for_unscaled_logits():
    """Logits of unit-scale inputs have unit scale although T5 does not divide by sqrt(head_dim)."""
    module = layers.Attention(2, 64)
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


def test_layer_norm_equals_numpy(rng):
    x = rng.normal(size=(2, 3, 8)) * 5 + 2
    scale = rng.normal(size=8)
    for epsilon in (1e-6, 0.5):
        found = layers.LayerNorm(epsilon).apply({"params": {"scale": jnp.asarray(scale)}}, x)
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_layer_norm_squares_in_float32():
    """256 entries of 1 and one of 100: summed in bfloat16, the ones would vanish in part."""
    x = jnp.concatenate([jnp.full(1, 100.0), jnp.ones(511)]).astype(jnp.bfloat16)
    found = layers.LayerNorm(dtype=jnp.bfloat16).apply({"params": {"scale": jnp.ones(512)}}, x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(found), np.float32(x) / np.sqrt((100**2 + 511) / 512), rtol=4e-3
    )


def test_zero_row_stays_finite_in_layer_norm():
    norm = layers.LayerNorm()

    def total(x):
        return norm.apply({"params": {"scale": jnp.ones(4)}}, x).sum()

    value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 4)))
    assert value == 0 and np.isfinite(gradient).all()


def gelu(x):
    """The tanh form, which T5 v1.1 was trained with."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


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


@pytest.mark.parametrize(
    "activation, function",
    [("relu", lambda x: np.maximum(x, 0)), ("gelu", gelu), ("linear", np.array)],
)
def test_adapter_equals_numpy(activation, function, rng):
    x = rng.normal(size=(2, 3, 6))
    down, up = rng.normal(size=(6, 4)), rng.normal(size=(4, 6))
    found = Adapter(AdapterConfig(4, activation)).apply(
        {"params": {"wi": {"kernel": down}, "wo": {"kernel": up}}}, jnp.asarray(x)
    )
    np.testing.assert_allclose(found, function(x @ down) @ up, atol=1e-5, rtol=1e-5)


def test_new_adapter_adds_nothing_but_can_learn(rng):
    x = jnp.asarray(rng.normal(size=(1, 3, 6)), jnp.float32)
    module = Adapter(AdapterConfig(4))
    params = module.init(jax.random.key(0), x)["params"]
    assert (np.asarray(module.apply({"params": params}, x)) == 0).all()
    gradient = jax.grad(lambda p: module.apply({"params": p}, x).sum())(params)
    assert np.asarray(gradient["wo"]["kernel"]).any()


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


def test_unknown_activation_and_empty_bottleneck_are_refused():
    with pytest.raises(ValueError, match="unknown activation 'swoosh'"):
        AdapterConfig(activation="swoosh")
    with pytest.raises(ValueError, match="bottleneck must be at least 1, got 0"):
        AdapterConfig(bottleneck=0)
