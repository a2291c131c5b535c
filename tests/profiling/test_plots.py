"""The pictures of the routing: what is taken has colour, the rest has none, one scale says both."""

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


HEADER = int(0.75 * 130)  # rows of pixels
DRAW = {"text": text, "images": images, "frames": frames}


@pytest.mark.parametrize("name", DRAW)
def test_the_picture_shades_what_is_taken(name, tmp_path):
    colored = []
    shapes = set()
    for taken in ([0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]):
        DRAW[name](tmp_path / "routing.png", np.array([taken, taken], np.float32))
        picture = image.imread(tmp_path / "routing.png")[..., :3]
        shapes.add(picture.shape)
        colored.append((np.ptp(picture[HEADER:], axis=-1) > 0.3).sum())
        assert (np.ptp(picture[:HEADER], axis=-1) > 0.3).sum() > 1000  # the scale
    assert len(shapes) == 1
    none, one, two = colored
    assert none == 0  # black, grey and white only
    # Two cells of seven in the map of each layer, or as many patches of each sheet.
    assert two - one > 1000 and one - none > 1000


def test_texts_of_one_line_have_room_for_their_maps(tmp_path):
    """Each example is as high as its layers need, and a long line goes on in the next one."""
    heights = {}
    for count, length in ((1, 5), (2, 5), (1, 15 * 5), (1, 40 * 5)):
        one = "a heading, $x$\nof two lines", ["x"] * length, np.zeros((12, length))
        plots.routed_text(tmp_path / "routing.png", [one] * count, "title", max_columns=5)
        heights[count, length] = image.imread(tmp_path / "routing.png").shape[0]
    assert heights[2, 5] - heights[1, 5] > 130 * 12 * 0.15
    assert heights[1, 15 * 5] > heights[1, 5] + 20
    assert heights[1, 40 * 5] == pytest.approx(heights[1, 15 * 5] + 11 * 130 * 0.135, abs=2)


def test_many_layers_of_an_image_stand_in_several_rows(tmp_path):
    shapes = []
    for layers in (4, 12):
        sheet = "a sheet", np.full((16, 112, 3), 255, np.uint8), np.ones((layers, 1, 7))
        plots.routed_images(tmp_path / "routing.png", [sheet], "title")
        shapes.append(image.imread(tmp_path / "routing.png").shape[:2])
    (low, narrow), (high, wide) = shapes
    assert wide == narrow and high > 1.5 * low


def luminance(colors):
    """How light colours are in print without colours."""
    return np.asarray(colors)[..., :3] @ [0.2126, 0.7152, 0.0722]


def test_colours_tell_weights_in_print_without_colours():
    weights = luminance(plots._WEIGHTS(np.linspace(0, 1, 11)))
    assert (np.diff(weights) > 0).all() and weights[0] > plots._NOT_TAKEN + 0.15
    counts = luminance(
        [(1, 1, 1, 1), *(plots._COUNTS(plots._DARKEST * n / 4) for n in (1, 2, 3, 4))]
    )
    assert (np.diff(counts) < -0.03).all() and counts[-1] > 0.5
