"""Which keys a query may see, against loops."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.nn.visibility import Visibility


@pytest.mark.parametrize(
    ("packed", "causal", "prefix"), [*itertools.product([False, True], repeat=3)]
)
def test_a_query_sees_what_is_there_of_its_segment_and_before_it(packed, causal, prefix, rng):
    """And all of the prefix."""
    keys = rng.random((2, 6)) < 0.7
    segments = rng.integers(1, 3, (2, 4)), rng.integers(1, 3, (2, 6))
    positions = np.array([[0, 2, 3, 9]]), np.arange(6)[None]
    given = {"query_segments": segments[0], "key_segments": segments[1]} if packed else {}
    if causal:
        given |= {"query_positions": positions[0], "key_positions": positions[1]}
    arrays = {name: jnp.asarray(x) for name, x in given.items()}
    visibility = Visibility(jnp.asarray(keys), **arrays, prefix=3 * prefix)
    found = visibility.array()
    assert found.shape == (2, 1, 4 if packed or causal else 1, 6 + 3 * prefix)
    assert visibility.same_for_all_queries == (not packed and not causal)
    found = np.broadcast_to(found, (2, 1, 4, found.shape[3]))[:, 0]
    assert found[..., : 3 * prefix].all()
    for row, query, key in itertools.product(range(2), range(4), range(6)):
        expected = keys[row, key]
        expected &= not packed or segments[0][row, query] == segments[1][row, key]
        expected &= not causal or key <= positions[0][0, query]
        assert found[row, query, 3 * prefix + key] == expected
