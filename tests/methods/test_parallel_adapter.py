"""The parallel adapter's options; what it computes is in test_equations and test_bottleneck."""

import pytest

from coda_jax.methods import ParallelAdapter


def test_unknown_activation_and_empty_bottleneck_are_refused():
    with pytest.raises(
        ValueError, match=r"ParallelAdapter\.activation must be one of .* got 'swoosh'"
    ):
        ParallelAdapter(activation="swoosh")
    with pytest.raises(ValueError, match=r"ParallelAdapter\.bottleneck must be .* 1, got 0"):
        ParallelAdapter(bottleneck=0)
