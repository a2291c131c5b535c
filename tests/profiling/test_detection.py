"""The picture of scores: what is told apart has a curve in the corner."""

from matplotlib import image
import numpy as np
import pytest

from coda_jax.profiling.detection import detection_picture


@pytest.mark.all
def test_a_score_that_tells_all_has_other_curves_than_one_that_tells_nothing(rng, tmp_path):
    inside = {"energy": rng.normal(size=50), "cosine": np.ones(50)}
    pictures = []
    for shift in (0, 9):
        outside = {"energy": rng.normal(size=40) - shift, "cosine": np.ones(40)}
        file = tmp_path / f"{shift}.png"
        detection_picture(file, ["in", "others $5"], [inside, outside], "title")
        pictures.append(image.imread(file)[..., :3])
    assert pictures[0].shape == pictures[1].shape
    orange = np.abs(np.stack(pictures) - np.array([255, 127, 14]) / 255).max(-1) < 0.1
    height, width = orange.shape[1:]
    # The upper left corner of the upper curves: where the curve runs along the border.
    corner = orange[
        :, int(0.1 * height) : int(0.35 * height), int(0.72 * width) : int(0.78 * width)
    ]
    assert corner[1].sum() > 2 * corner[0].sum() > 0
