"""The picture of a run's metrics: a panel for each, training and evaluation in two colours."""

from matplotlib import image
import numpy as np
import pytest

from coda_jax.profiling.learning_curve import learning_curve

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
FALLING = [(step, 1 / step) for step in range(1, 60)]


def drawn(path, training, evaluation):
    """The picture's width, and how many of its pixels are of training and of evaluation."""
    learning_curve(path, training, evaluation, "my_run, $5")
    picture = image.imread(path)[..., :3]
    counts = [
        int((np.abs(picture - np.array(color) / 255).max(-1) < 0.02).sum())
        for color in (BLUE, ORANGE)
    ]
    return picture.shape[1], *counts


def test_each_metric_of_the_evaluation_has_a_panel_beside_the_loss(tmp_path):
    path = tmp_path / "curve.png"
    alone, blue, orange = drawn(path, {"loss": FALLING, "learning_rate": FALLING}, {})
    assert blue > 100 and orange == 0
    evaluation = {"loss": FALLING[::20], "exact_match": FALLING[::20]}
    both, blue_of_both, orange_of_both = drawn(path, {"loss": FALLING}, evaluation)
    assert both > 1.5 * alone and orange_of_both > 200
    assert blue_of_both == pytest.approx(blue, rel=0.5)


def test_many_metrics_stand_in_several_rows(tmp_path):
    shapes = []
    for count in (4, 5):
        curves = {"loss": FALLING, **{f"metric {i}": FALLING for i in range(count - 1)}}
        learning_curve(tmp_path / "curve.png", {}, curves, "my_run")
        shapes.append(image.imread(tmp_path / "curve.png").shape[:2])
    (low, narrow), (high, wide) = shapes
    assert wide == narrow and high > 1.7 * low


def test_one_evaluation_is_seen(tmp_path):
    curves = {"loss": FALLING[:1]}
    _, blue, orange = drawn(tmp_path / "curve.png", curves, curves)
    _, _, none = drawn(tmp_path / "curve.png", curves, {})
    assert blue > 0 and orange > 20 and none == 0


def test_what_is_not_finite_is_left_out(tmp_path):
    curve = [*FALLING, (60, float("nan")), (61, float("inf"))]
    assert drawn(tmp_path / "curve.png", {"loss": curve}, {})[1] > 100
