"""A picture of which classes were taken for which."""

from collections.abc import Sequence
import os

import numpy as np

from coda_jax.optional import needs
from coda_jax.profiling.labels import plain

with needs("images"):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

_COLORS = matplotlib.colormaps["Blues"]
_NUMBERED = 25  # classes whose cells have their counts in them
_NAMED = 150  # classes that are named on the axes; beyond, they are numbered from 0
_LONGEST = 24  # characters of a name


def confusion_picture(
    path: str | os.PathLike, counts: np.ndarray, labels: Sequence[str], title: str
) -> None:
    """Draws the share of each class's examples that were taken for each class.

    Args:
        path: the PNG file to write.
        counts: [C, C] examples of a class (row) that were taken for a class (column).
        labels: names of the classes.
        title: above the picture.
    """
    count = len(labels)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [_shown(label) for label in labels]
    side = max(2.4, min(0.42 * count, 10.0), 0.11 * min(count, _NAMED))
    figure = Figure(figsize=(side + 1.2, side), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap=_COLORS, vmin=0, vmax=1)
    if count <= _NUMBERED:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.55 else "black"
            text = {"ha": "center", "va": "center", "fontsize": 7, "color": color}
            axes.text(column, row, f"{counts[row, column]:,}", **text)
    if count <= _NAMED:
        size = 8 if count <= _NUMBERED else 6
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
    axes.set_xlabel("taken for", fontsize=9)
    axes.set_ylabel("is", fontsize=9)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the examples of a class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_title(plain(title), fontsize=10)
    figure.savefig(path, format="png", bbox_inches="tight")


def _shown(label: str) -> str:
    """A name on one short line, without matplotlib's formulas."""
    text = " ".join(label.split())
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return plain(text)
