"""Attention with relative keys against loops in numpy, as a CPU and as a TPU compute it."""

from helpers import as_on_tpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from coda_jax.nn.relative_keys import RelativeKeyAttention

HEADS, HEAD_DIM, WIDTH = 2, 4, 6
# As published, both ways, an even number of distances, and one alone.
REACHES = [(64, 8), (2, 5), (4, 3), (0, 0)]


def random_params(rng, num_distances):
    """Returns parameters whose position term is as large as the keys' own."""
    params = {"distance_embedding": rng.normal(size=(num_distances, HEAD_DIM))}
    for name in ("query", "key", "value", "out"):
        shape = (HEADS * HEAD_DIM, WIDTH) if name == "out" else (WIDTH, HEADS * HEAD_DIM)
        params[name] = {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[1])}
    return {"params": jax.tree.map(jnp.float32, params)}


def numpy_attention(params, reach, x_q, x_kv, mask, query_positions, key_positions):
    """Loops over examples, heads and queries, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])

    def heads(name, x):
        return (x @ p[name]["kernel"] + p[name]["bias"]).reshape(*x.shape[:2], HEADS, HEAD_DIM)

    query, key, value = heads("query", x_q), heads("key", x_kv), heads("value", x_kv)
    y = np.zeros(query.shape)
    for b, h, q in np.ndindex(*y.shape[0:1], HEADS, y.shape[1]):
        distance = np.clip(key_positions[b] - query_positions[b, q], -reach[0], reach[1])
        keys = key[b, :, h] + p["distance_embedding"][distance + reach[0]]
        logits = np.where(mask[b, 0, q], keys @ query[b, q, h] / np.sqrt(HEAD_DIM), -1e10)
        y[b, q, h] = softmax(logits) @ value[b, :, h]
    return y.reshape(*y.shape[:2], -1) @ p["out"]["kernel"] + p["out"]["bias"]


def example(rng, reach, num_queries=20, num_keys=30, farthest=150):
    """Returns parameters and inputs; positions are in any order, and some are the same."""
    positions = [rng.integers(0, farthest, (2, n)) for n in (num_queries, num_keys)]
    mask = rng.random((2, 1, num_queries, num_keys)) < 0.8
    x_q, x_kv = (rng.normal(size=(2, n, WIDTH)) for n in (num_queries, num_keys))
    return random_params(rng, sum(reach) + 1), (x_q, x_kv, mask, *positions)


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("reach", REACHES)
def test_equals_loops_at_any_positions(reach, rng):
    params, inputs = example(rng, reach)
    found = RelativeKeyAttention(HEADS, HEAD_DIM, *reach).apply(params, *inputs, deterministic=True)
    np.testing.assert_allclose(found, numpy_attention(params, reach, *inputs), atol=2e-5)


@pytest.mark.usefixtures("branches")
def test_positions_of_all_rows_may_be_given_once_and_may_be_large(rng):
    params, (x_q, x_kv, mask, *_) = example(rng, (64, 8))
    positions = [10**6 + np.arange(n)[None] for n in (20, 30)]
    found = RelativeKeyAttention(HEADS, HEAD_DIM, 64, 8).apply(
        params, x_q, x_kv, mask, *positions, deterministic=True
    )
    repeated = (np.repeat(p, 2, axis=0) for p in positions)
    expected = numpy_attention(params, (64, 8), x_q, x_kv, mask, *repeated)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    "reach", [REACHES[0], *(pytest.param(x, marks=pytest.mark.all) for x in REACHES[1:])]
)
def test_gradients_on_tpus_are_those_of_the_look_up(reach, rng):
    params, inputs = example(rng, reach)
    module = RelativeKeyAttention(HEADS, HEAD_DIM, *reach)

    def gradients():
        def loss(params, x_q, x_kv):
            y = module.apply(params, x_q, x_kv, *inputs[2:], deterministic=True)
            return jnp.sum(y**2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(params, *map(jnp.float32, inputs[:2]))

    expected = gradients()
    with as_on_tpu():
        found = gradients()
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * largest)
    if reach != (0, 0):  # one vector for all keys changes no weight
        assert np.abs(expected[0]["params"]["distance_embedding"]).max() > 1e-3 * largest


@pytest.mark.usefixtures("processor")
def test_on_tpus_bfloat16_loses_as_little_as_by_the_look_up(rng):
    params, inputs = example(rng, (64, 8))
    expected = numpy_attention(params, (64, 8), *inputs)

    def error():
        module = RelativeKeyAttention(HEADS, HEAD_DIM, 64, 8, dtype=jnp.bfloat16)
        found = module.apply(params, *inputs, deterministic=True)
        return np.abs(np.float64(found) - expected).mean()

    looked_up = error()
    with as_on_tpu():
        assert 0 < error() < 1.3 * looked_up
