"""The pictures of the routing: what is taken has colour, the rest has none."""

from matplotlib import image
import numpy as np
import pytest

from coda_jax.profiling import plots


def text(path, weights):
    """A function of seven tokens; two layers."""
    tokens = ["def f(x):", "\n", "    ", "return ", "$x$", "\n", ""]
    plots.routed_text(path, [("a function", tokens, weights)], "title")


def images(path, weights):
    """A white sheet of seven patches; two layers."""
    sheet = np.full((16, 7 * 16, 3), 255, np.uint8)
    plots.routed_images(path, [("a sheet", sheet, weights.reshape(2, 1, 7))], "title")


def frames(path, weights):
    """A spectrogram of two windows to each of seven frames; two layers."""
    plots.routed_frames(path, [("a word", np.zeros((14, 80)), weights)], "title", seconds=0.02)


DRAW = {"text": text, "images": images, "frames": frames}


@pytest.mark.parametrize("name", DRAW)
def test_the_picture_shades_what_is_taken(name, tmp_path):
    colored = []
    shapes = set()
    for taken in ([0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]):
        DRAW[name](tmp_path / "routing.png", np.array([taken, taken], np.float32))
        picture = image.imread(tmp_path / "routing.png")[..., :3]
        shapes.add(picture.shape)
        colored.append((np.ptp(picture, axis=-1) > 0.3).sum())
    assert len(shapes) == 1
    none, one, two = colored
    if name != "frames":  # whose spectrogram has colours
        assert none == 0  # black, grey and white only
    # Two cells of seven in the map of each layer, or as many patches of each sheet.
    assert two - one > 1000 and one - none > 1000
