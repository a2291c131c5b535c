"""The pictures of a comparison: their size, and that each number moves something in them."""

from comparison_reports import hostile, report, sparse
from matplotlib import image
import numpy as np
import pytest

from coda_jax.profiling import comparison_plots

DRAW = {
    "quality": (comparison_plots.quality_over_speed, (780, 1200)),
    "curves": (comparison_plots.learning_curves, (711, 1500)),
}


def drawn(name, folder, found):
    """The picture [height, width, 3]."""
    draw, _ = DRAW[name]
    draw(folder / "picture.png", found)
    return image.imread(folder / "picture.png")[..., :3]


@pytest.mark.parametrize("name", DRAW)
def test_the_picture_has_its_size_and_every_recipe_its_colour(name, tmp_path):
    found = report()
    picture = drawn(name, tmp_path, found)
    assert picture.shape[:2] == DRAW[name][1]
    for i, color in enumerate(comparison_plots.comparison_points.COLORS):
        wanted = np.array([int(color[j : j + 2], 16) for j in (1, 3, 5)]) / 255
        near = np.abs(picture - wanted).max(axis=-1) < 0.02
        assert near.sum() > 50, (i, color)


def test_without_its_speed_a_recipe_is_no_point(tmp_path):
    found = report()
    whole = drawn("quality", tmp_path, found)
    del found["recipes"]["full fine-tuning"]["speed"]
    assert (whole != drawn("quality", tmp_path, found)).any(axis=-1).sum() > 200


@pytest.mark.all
def test_a_seed_of_which_a_step_is_missing_does_not_end_a_mean(tmp_path):
    """Nor does a loss that is not a number; what is drawn of the others stays."""
    found = report()
    for recipe in found["recipes"].values():
        recipe["cells"]["1"]["curve"]["loss"][3][1] = float("nan")
        recipe["cells"]["2"]["curve"]["eval/loss"].pop()
    assert drawn("curves", tmp_path, found).shape[:2] == DRAW["curves"][1]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("quality", hostile),
        ("curves", sparse),
        pytest.param("curves", hostile, marks=pytest.mark.all),
        pytest.param("quality", sparse, marks=pytest.mark.all),
        *(pytest.param(name, dict, marks=pytest.mark.all) for name in DRAW),
    ],
)
def test_a_report_without_numbers_or_with_strange_names_is_drawn(name, make, tmp_path):
    assert np.ptp(drawn(name, tmp_path, make())) > 0.5
