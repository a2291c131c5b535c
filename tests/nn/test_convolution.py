"""The convolution by channel."""

import jax
import jax.numpy as jnp
import numpy as np

from coda_jax.nn.convolution import causal_convolution


def test_causal_convolution_is_that_of_xla(rng):
    x, kernel = rng.normal(size=(2, 9, 3)), rng.normal(size=(4, 3))
    expected = jax.lax.conv_general_dilated(
        x, kernel[:, None], (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=3,
    )  # fmt: skip
    found = causal_convolution(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_segment_does_not_see_the_one_before(rng):
    x, kernel = rng.normal(size=(1, 9, 3)), rng.normal(size=(4, 3))
    segments = np.array([[1, 1, 1, 2, 3, 3, 3, 3, 3]])
    found = causal_convolution(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(segments))
    for first, last in ((0, 3), (3, 4), (4, 9)):
        alone = causal_convolution(jnp.asarray(x[:, first:last]), jnp.asarray(kernel))
        np.testing.assert_allclose(found[:, first:last], alone, atol=1e-6)
