"""Timing in turns, and the pictures."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import benchmark, plots


def test_functions_take_turns():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = benchmark.time_interleaved(functions, rounds=3, warm_up=1)
    assert calls == list("ab" * 4)
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_speed_up_is_the_median_of_the_rounds_ratios():
    slow, fast = benchmark.Timing((4.0, 9.0, 2.0)), benchmark.Timing((2.0, 3.0, 2.0))
    middle, low, high = benchmark.speed_up(slow, fast)
    assert (low, middle, high) == (1.5, 2.0, 2.5)
    assert slow.median == 4.0


def test_flops_of_a_matrix_product():
    x, y = jnp.ones((8, 16)), jnp.ones((16, 32))
    compiled = jax.jit(jnp.dot).lower(x, y).compile()
    assert benchmark.flops(compiled) == pytest.approx(2 * 8 * 16 * 32, rel=0.01)
    assert benchmark.peak_memory(compiled) >= 4 * (8 * 16 + 16 * 32 + 8 * 32)


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        benchmark.time_interleaved({}, rounds=0)


def test_the_picture_shades_what_is_taken(tmp_path):
    from matplotlib import image

    tokens = ["def f(x):", "\n", "    ", "return ", "$x$", "\n", ""]
    pictures = []
    for taken in ([0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]):
        weights = np.array([taken, taken], np.float32)
        plots.routed_text(tmp_path / "routing.png", [("a function", tokens, weights)], "title")
        pictures.append(image.imread(tmp_path / "routing.png")[..., :3])
    colored = [(np.ptp(picture, axis=-1) > 0.3).sum() for picture in pictures]
    assert colored[0] == 0  # black, grey and white only
    # Eleven characters of the listing and two columns of seven in the map.
    assert colored[1] > 2000
    assert all(itertools.starmap(np.array_equal, [(p.shape, pictures[0].shape) for p in pictures]))
