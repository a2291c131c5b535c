"""The picture of a confusion: the more of a class's examples, the darker the cell."""

from matplotlib import image
import numpy as np
import pytest

from coda_jax.profiling.confusion import confusion_picture


@pytest.mark.parametrize("count", [12, *(pytest.param(x, marks=pytest.mark.all) for x in (2, 70))])
def test_what_is_right_is_dark_and_the_rest_is_not(count, tmp_path):
    labels = [f"class {i} $5" for i in range(count)]
    dark = []
    for counts in (np.eye(count, dtype=int) * 7, np.full((count, count), 7)):
        confusion_picture(tmp_path / "confusion.png", counts, labels, "title")
        picture = image.imread(tmp_path / "confusion.png")[..., :3]
        # Behind the picture's frame, of the darkest blue.
        cells = picture[: int(0.8 * len(picture)), : int(0.8 * picture.shape[1])]
        dark.append((np.abs(cells - np.array([8, 48, 107]) / 255).max(-1) < 0.05).mean())
    assert dark[0] > 2 * dark[1]
