"""Products with zeros and ones against indexing and sums in float64."""

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.nn import one_hot

# Outside of this range numbers lose bits in three bfloat16 parts.
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 2**-100)


@given(
    values=st.lists(FLOATS, min_size=1, max_size=9),
    data=st.data(),
)
def test_one_chosen_value_is_that_value_to_the_last_bit(values, data):
    values = np.array(values, np.float32)
    indices = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=5))
    chosen = one_hot.one_hot_rows(jnp.array([indices]), len(values))
    found = one_hot.chosen_sums(chosen, jnp.asarray(values[None]))
    np.testing.assert_array_equal(found[0], values[indices])


def test_sums_are_those_of_float64_and_so_are_their_gradients(rng):
    chosen = rng.random((3, 40, 200)) < 0.5
    values = np.float32(np.exp(rng.normal(size=(3, 200)) * 8))
    cotangent = np.float32(rng.normal(size=(3, 40)))
    found, pull = jax.vjp(lambda x: one_hot.chosen_sums(jnp.asarray(chosen), x), values)
    expected = np.einsum("bmn,bn->bm", chosen, np.float64(values))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    (gradient,) = pull(cotangent)
    expected = np.einsum("bmn,bm->bn", chosen, np.float64(cotangent))
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("length", [1, 256, 700])
def test_the_place_of_a_slot_and_its_value_are_exact_and_so_is_the_gradient(length, rng):
    """The last slot has no place."""
    values = np.float32(np.exp(rng.normal(size=(2, length)) * 8))
    places = np.stack([rng.permutation(length)[:9] for _ in range(2)])
    num_slots = places.shape[1] + 1
    slots = np.full((2, length), num_slots)
    np.put_along_axis(slots, places, np.arange(places.shape[1])[None], axis=1)
    (found, at_them), pull = jax.vjp(
        lambda x: one_hot.places_and_values(jnp.asarray(slots), x, num_slots), values
    )
    np.testing.assert_array_equal(found, np.pad(places, ((0, 0), (0, 1))))
    expected = np.pad(np.take_along_axis(values, places, axis=1), ((0, 0), (0, 1)))
    np.testing.assert_array_equal(at_them, expected)
    cotangent = rng.normal(size=at_them.shape).astype(np.float32)
    (gradient,) = pull((np.zeros(found.shape, jax.dtypes.float0), cotangent))
    expected = np.zeros_like(values)
    np.put_along_axis(expected, places, cotangent[:, :-1], axis=1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_the_running_count_is_cumsum(length, rng):
    keep = rng.random((2, 3, length)) < 0.7
    np.testing.assert_array_equal(one_hot.running_count(jnp.asarray(keep)), keep.cumsum(-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_are_added_where_they_belong(dtype, rng):
    x, rows = (jnp.asarray(rng.normal(size=(2, n, 4)), dtype) for n in (9, 3))
    indices = np.array([[0, 4, 8], [1, 2, 3]])
    expected = np.array(x, np.float32)
    for row, places, added in zip(expected, indices, np.float32(rows), strict=True):
        row[places] += added
    found = one_hot.add_rows(x, jnp.asarray(indices), rows)
    assert found.dtype == dtype
    rounding = 0.01 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(np.float32(found), expected, rtol=rounding)


def test_a_product_is_added_to_all_rows(rng):
    x, rows, left, right = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in [(2, 9, 4), (2, 3, 4), (2, 9, 5), (5, 4)]
    )
    indices = jnp.array([[0, 4, 8], [1, 2, 3]])
    found = one_hot.add_rows(x, indices, rows, (left, right))
    np.testing.assert_allclose(found, one_hot.add_rows(x, indices, rows) + left @ right, atol=1e-5)
