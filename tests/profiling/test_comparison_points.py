"""Which recipes are points of the picture, which of them are best, and where labels stand."""

import itertools

from comparison_reports import report, sparse
import numpy as np
import pytest

from coda_jax.profiling import comparison_points, labels
from coda_jax.profiling.comparison_points import Point


def test_points_are_the_recipes_with_quality_and_speed():
    found = report()
    del found["recipes"]["LoRA"]["speed"]["4x1024"]
    found["recipes"]["prefix tuning"]["mean"] = float("nan")
    points = comparison_points.points(found)
    names = list(found["recipes"])
    assert [p.name for p in points] == [n for n in names if n not in ("LoRA", "prefix tuning")]
    for point in points:
        recipe = found["recipes"][point.name]
        assert point.name == names[point.index]
        assert (point.quality, point.error) == (recipe["mean"], recipe["error"])
        speed = recipe["speed"]["4x1024"]["encoder_speed_up"]["dense model"]
        assert [point.speed, *point.quartiles] == speed
    assert comparison_points.points(sparse()) == []


@pytest.mark.parametrize("better", ["max", "min"])
def test_the_front_is_what_no_other_point_dominates(better, rng):
    numbers = rng.integers(1, 30, (40, 2)).tolist()
    numbers += [[x, y + 1] for x, y in numbers]  # ties
    points = [Point(i, str(i), x, (x, x), y, 0.0) for i, (x, y) in enumerate(numbers)]
    sign = -1 if better == "min" else 1

    def dominates(a, b):
        return (
            a.speed >= b.speed
            and sign * a.quality >= sign * b.quality
            and (a.speed, a.quality) != (b.speed, b.quality)
        )

    best = {(p.speed, p.quality) for p in points if not any(dominates(q, p) for q in points)}
    found = comparison_points.front(points, better)
    assert [(p.speed, p.quality) for p in found] == sorted(best)
    assert len(best) > 2


@pytest.mark.parametrize("ratio", [False, True])
def test_ticks_are_few_and_round(ratio, rng):
    for low, factor in zip(rng.uniform(0.2, 80, 200), rng.uniform(1.02, 30, 200), strict=True):
        found = labels.ticks(low, low * factor, ratio)
        assert 3 <= len(found) <= 8
        assert low <= found[0] < found[-1] <= low * factor
        assert all(len(f"{x:.6g}".replace(".", "").strip("0")) <= 4 for x in found)
    assert labels.ticks(0.85, 8.2, ratio=True) == [1, 1.5, 2, 3, 4, 6, 8]


def apart(one, other):
    return one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]


def test_labels_cover_neither_each_other_nor_the_points(rng):
    bounds = (0, 0, 700, 500)
    anchors = [tuple(x) for x in rng.uniform((100, 100), (500, 400), (14, 2))]
    anchors += [(640, 480), (641, 480), (60, 20)]  # at an edge, and one upon the other
    placed = labels.place(anchors, [(90, 16)] * len(anchors), bounds, radius=6)
    markers = [(x - 6, y - 6, x + 6, y + 6) for x, y in anchors]
    assert all(apart(a, b) for a, b in itertools.combinations(placed, 2))
    assert all(apart(a, b) for a, b in itertools.product(placed, markers))
    inside = np.array(placed)
    assert (inside >= 0).all() and (inside[:, 2] <= 700).all() and (inside[:, 3] <= 500).all()


def test_a_label_that_had_to_move_is_led_to_its_point():
    assert labels.leader((0, 0), (10, -8, 90, 8)) is None
    assert labels.leader((0, 0), (10, 30, 90, 46)) == (10, 30)
