"""The buckets of positions against the original code."""

import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.nn import position_bias

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
        position_bias.relative_position_bucket(DISTANCES, False, 32, 128), one_way
    )
    both_ways = np.searchsorted(FIRST_OF_BUCKET_BOTH_WAYS, abs(DISTANCES), side="right") - 1
    both_ways += 16 * (DISTANCES > 0)
    np.testing.assert_array_equal(
        position_bias.relative_position_bucket(DISTANCES, True, 32, 128), both_ways
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
        position_bias.relative_position_bucket(DISTANCES, bidirectional, *sizes), expected.numpy()
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
        position_bias.relative_position_bucket(DISTANCES, bidirectional, 32, 128), expected
    )


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_is_looked_up_by_true_position(bidirectional, rng):
    """Queries and keys are any ascending choice of positions, some farther apart than the limit."""
    table = rng.normal(size=(3, 8)).astype(np.float32)
    queries = np.sort(rng.choice(60, (2, 5)), axis=-1)
    keys = np.sort(rng.choice(60, (2, 7)), axis=-1)
    module = position_bias.RelativePositionBiases(8, 16, 3, bidirectional)
    found = module.apply(
        {"params": {"rel_embedding": table}}, jnp.asarray(queries), jnp.asarray(keys)
    )
    bias = found.array()
    np.testing.assert_array_equal(found.tile(2).array(), np.tile(bias, 2))
    assert bias.shape == (2, 3, 5, 7)
    for b in range(2):
        for q in range(5):
            for j in range(7):
                distance = np.array(keys[b, j] - queries[b, q])
                bucket = position_bias.relative_position_bucket(distance, bidirectional, 8, 16)
                np.testing.assert_array_equal(bias[b, :, q, j], table[:, bucket])
