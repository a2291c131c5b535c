"""Pictures of the routing: which tokens each layer sends through the frozen layer."""

from collections.abc import Sequence
import os

import numpy as np

from coda_jax.optional import needs

with needs("images"):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

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


def routed_images(
    path: str | os.PathLike,
    examples: Sequence[tuple[str, np.ndarray, np.ndarray]],
    title: str,
) -> None:
    """Draws images once for each layer, with the patches that the layer takes tinted by weight.

    Args:
        path: the PNG file to write.
        examples: (heading, image [height, width, 3] of 0 to 255, weights [layers, rows, columns])
            of each; 0: not taken.
        title: above the picture.
    """
    num_layers = len(examples[0][2])
    width = 3.6
    heights = [width * image.shape[0] / image.shape[1] + 0.4 for _, image, _ in examples]
    figure = Figure(figsize=(num_layers * width + 0.4, sum(heights) + 0.6), dpi=130)
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(examples), num_layers, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        bottom=0.01,
        top=1 - 0.7 / figure.get_figheight(),
        wspace=0.03,
        hspace=0.3,
    )
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / figure.get_figheight())
    for row, (heading, image, weights) in zip(panels, examples, strict=True):
        row[0].set_title(heading, fontsize=8.5, loc="left")
        for layer, (axes, taken) in enumerate(zip(row, weights, strict=True)):
            axes.imshow(_tinted(image, taken), aspect="auto", interpolation="nearest")
            axes.set_title(f"layer {layer}", fontsize=7, loc="right")
            axes.axis("off")
    figure.savefig(path)


def routed_frames(
    path: str | os.PathLike,
    examples: Sequence[tuple[str, np.ndarray, np.ndarray]],
    title: str,
    seconds: float,
) -> None:
    """Draws spectrograms, and under each which frames each layer takes, shaded by weight.

    Args:
        path: the PNG file to write.
        examples: (heading, spectrogram [windows, bins], weights [layers, frames]) of each; 0: not
            taken.
        title: above the picture.
        seconds: of a frame.
    """
    figure = Figure(figsize=(11, 2.2 * len(examples) + 0.8), dpi=130)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(examples),
        1,
        left=0.06,
        right=0.985,
        bottom=0.45 / figure.get_figheight(),
        top=1 - 0.6 / figure.get_figheight(),
        hspace=0.3,
    )
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / figure.get_figheight())
    for (heading, spectrogram, weights), place in zip(examples, grid, strict=True):
        cells = place.subgridspec(2, 1, height_ratios=[3, 2], hspace=0.04)
        upper, lower = (figure.add_subplot(cell) for cell in cells)
        end = weights.shape[1] * seconds
        upper.imshow(
            spectrogram.T, aspect="auto", origin="lower", cmap="magma", extent=(0, end, 0, 1)
        )
        upper.set_title(heading, fontsize=8.5, loc="left", pad=3)
        upper.set_ylabel("mel bin", fontsize=7)
        upper.set_xticks([])
        upper.set_yticks([])
        _draw_map(lower, weights, extent=(0, end, len(weights) - 0.5, -0.5))
    lower.set_xlabel("seconds", fontsize=7)
    figure.savefig(path)


def _tinted(image, weights):
    """The image in grey: what is taken has the colour of its weight, the rest is dimmed."""
    height, width = image.shape[:2]
    rows = np.arange(height) * weights.shape[0] // height
    columns = np.arange(width) * weights.shape[1] // width
    weights = weights[rows][:, columns]
    grey = image.mean(axis=-1, keepdims=True) / 255
    color = np.where(weights[..., None] > 0, _COLORS(0.75 * weights)[..., :3], 0.45)
    return grey * color


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


def _draw_map(axes, weights, extent=None):
    """The weights, one row per layer; `extent` is matplotlib's, None to count tokens."""
    image = np.ma.masked_equal(weights, 0)
    axes.set_facecolor("#f2f2f2")
    axes.imshow(
        image,
        aspect="auto",
        cmap=_COLORS,
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=extent,
    )
    axes.set_yticks(range(len(weights)), [f"layer {i}" for i in range(len(weights))], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
