"""Pictures of the routing: which tokens each layer sends through the frozen layer."""

from collections.abc import Sequence
import os

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
import numpy as np

_COLORS = matplotlib.colormaps["YlOrRd"]
_CHARACTER = 0.062  # inches at the listing's font size
_LINE = 0.135
_FONT_SIZE = 7.2


def routed_text(
    path: str | os.PathLike,
    examples: Sequence[tuple[str, Sequence[str], np.ndarray]],
    title: str,
    max_lines: int = 26,
    max_columns: int = 88,
) -> None:
    """Draws texts whose tokens are shaded by how many layers take them, and a map of each layer.

    Args:
        path: the PNG file to write.
        examples: (heading, tokens as text, weights [layers, tokens]) of each; 0: not taken.
        title: above the picture.
        max_lines: of a text that are shown.
        max_columns: of a line that are shown.
    """
    heights = [
        min(max_lines, 1 + "".join(tokens).count("\n")) * _LINE + 0.5 for _, tokens, _ in examples
    ]
    width, map_width = max_columns * _CHARACTER, 4.2
    figure = Figure(figsize=(width + map_width + 1.0, sum(heights) + 0.9), dpi=130)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(examples),
        2,
        height_ratios=heights,
        width_ratios=[width, map_width],
        left=0.02,
        right=0.98,
        top=1 - 0.75 / figure.get_figheight(),
        bottom=0.45 / figure.get_figheight(),
        hspace=0.25,
        wspace=0.08,
    )
    figure.suptitle(title, fontsize=11, y=1 - 0.2 / figure.get_figheight())
    for row, (heading, tokens, weights) in enumerate(examples):
        listing = figure.add_subplot(grid[row, 0])
        _draw_listing(listing, tokens, weights, max_lines, max_columns)
        listing.set_title(heading, fontsize=8.5, loc="left")
        layer_map = figure.add_subplot(grid[row, 1])
        _draw_map(layer_map, weights)
        if row == 0:
            layer_map.set_title("routing weight (grey: not taken)", fontsize=7.5, loc="left")
        if row == len(examples) - 1:
            layer_map.set_xlabel("token", fontsize=7)
    figure.savefig(path)


def _draw_listing(axes, tokens, weights, max_lines, max_columns):
    """The text; a token's shade is the share of layers that take it."""
    share = (weights > 0).mean(axis=0)
    lines = "".join(tokens).count("\n") + 1
    axes.set(xlim=(0, max_columns), ylim=(min(lines, max_lines), 0))
    axes.axis("off")
    line = column = 0
    for token, value in zip(tokens, share, strict=True):
        for character in token:
            if line < max_lines and column < max_columns and character != "\n":
                color = _COLORS(0.75 * value) if value else "white"
                axes.add_patch(Rectangle((column, line), 1, 1, facecolor=color, linewidth=0))
                axes.text(
                    column + 0.5,
                    line + 0.78,
                    character.replace("$", r"\$"),
                    family="monospace",
                    fontsize=_FONT_SIZE,
                    ha="center",
                )
            line, column = (line + 1, 0) if character == "\n" else (line, column + 1)


def _draw_map(axes, weights):
    """The weights, one row per layer."""
    image = np.ma.masked_equal(weights, 0)
    axes.set_facecolor("#f2f2f2")
    axes.imshow(image, aspect="auto", cmap=_COLORS, vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(weights)), [f"layer {i}" for i in range(len(weights))], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
