"""Timing in turns, and the operations and memory of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from coda_jax.profiling import timing


def test_functions_take_turns():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = timing.time_interleaved(functions, rounds=3, warm_up=1)
    assert calls == list("ab" * 4)
    assert {name: len(taken.seconds) for name, taken in timings.items()} == {"a": 3, "b": 3}


def test_speed_up_is_the_median_of_the_rounds_ratios():
    slow, fast = timing.Timing((4.0, 9.0, 2.0)), timing.Timing((2.0, 3.0, 2.0))
    middle, low, high = timing.speed_up(slow, fast)
    assert (low, middle, high) == (1.5, 2.0, 2.5)
    assert slow.median == 4.0


def test_flops_of_a_matrix_product():
    x, y = jnp.ones((8, 16)), jnp.ones((16, 32))
    compiled = jax.jit(jnp.dot).lower(x, y).compile()
    assert timing.flops(compiled) == pytest.approx(2 * 8 * 16 * 32, rel=0.01)
    assert timing.peak_memory(compiled) >= 4 * (8 * 16 + 16 * 32 + 8 * 32)


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be a whole number of at least 1, got 0"):
        timing.time_interleaved({}, rounds=0)


def test_versions_are_those_of_what_is_installed():
    found = timing.versions(("jax", "no_such_package"))
    assert found == {"jax": jax.__version__, "device": "cpu", "platform": "cpu"}
