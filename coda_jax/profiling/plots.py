"""Pictures of the routing: which tokens each layer sends through the frozen layer.

In all of them a colour is a routing weight, the brighter the larger, and dark grey is what a layer
does not take; but for a text's letters, whose blue tells how many layers take them.
"""

from collections.abc import Iterator, Sequence
import os

import numpy as np

from coda_jax.optional import needs
from coda_jax.profiling.labels import plain

with needs("images"):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator

# Both get steadily lighter or darker, for the colour-blind and in print without colours.
_WEIGHTS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.55, 1, 128)))
_COUNTS = matplotlib.colormaps["Blues"]
_DARKEST = 0.6  # of the counts, on which black letters can be read
_NOT_TAKEN = 0.3  # grey
_CHARACTER = 0.062  # inches at the listing's font size
_LINE = 0.135
_FONT_SIZE = 7.2
_LAYER = 0.15  # inches of a layer in a map
_NAMED_LAYERS = 12  # at most
_TITLE, _TICKS = 0.28, 0.3  # inches above and below a panel
_HEADER = 0.75  # inches of the title and the scale
_HEADING = 110  # characters


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
        max_columns: of a line; what is longer goes on in the next one.
    """
    count = len(examples[0][2])
    placed = [list(_placed(tokens, max_lines, max_columns)) for _, tokens, _ in examples]
    lines = [1 + max((line for line, *_ in cells), default=0) for cells in placed]
    bodies = [max(n * _LINE, count * _LAYER) for n in lines]
    text_width, map_width, left = max_columns * _CHARACTER, 4.2, 0.3
    width = left + text_width + 0.75 + map_width + 0.25
    height = _HEADER + sum(bodies) + len(examples) * (_TITLE + _TICKS) + 0.15
    figure = _figure(width, height, title)
    at = _Inches(figure)
    top = height - _HEADER
    for (heading, _, weights), cells, n, body in zip(examples, placed, lines, bodies, strict=True):
        top -= _TITLE
        listing = at.axes(left, top - n * _LINE, text_width, n * _LINE)
        _draw_listing(listing, cells, weights, max_columns)
        listing.set_title(_heading(heading), fontsize=8.5, loc="left")
        _draw_map(at.axes(left + text_width + 0.75, top - body, map_width, body), weights)
        top -= body + _TICKS
    figure.axes[-1].set_xlabel("token", fontsize=7)
    _draw_counts(figure, at, left, count)
    _draw_scale(figure, at.axes(width - 0.25 - map_width, height - 0.58, 1.9, 0.1))
    figure.savefig(path)


def routed_images(
    path: str | os.PathLike,
    examples: Sequence[tuple[str, np.ndarray, np.ndarray]],
    title: str,
    columns: int = 4,
) -> None:
    """Draws images once for each layer, with the patches that the layer takes tinted by weight.

    Args:
        path: the PNG file to write.
        examples: (heading, image [height, width, 3] of 0 to 255, weights [layers, rows, columns])
            of each; 0: not taken.
        title: above the picture.
        columns: layers beside each other, at most.
    """
    panel, gap = 3.6, 0.12
    columns = min(columns, len(examples[0][2]))
    heights = [panel * image.shape[0] / image.shape[1] + _TITLE for _, image, _ in examples]
    rows = [-(-len(weights) // columns) for _, _, weights in examples]
    width = columns * (panel + gap) + gap
    height = _HEADER + sum(n * h for n, h in zip(rows, heights, strict=True)) + gap
    figure = _figure(width, height, title)
    at = _Inches(figure)
    top = height - _HEADER
    for (heading, image, weights), body in zip(examples, heights, strict=True):
        for layer, taken in enumerate(weights):
            row, column = divmod(layer, columns)
            place = gap + column * (panel + gap), top - (row + 1) * body, panel, body - _TITLE
            axes = at.axes(*place)
            axes.imshow(_tinted(image, taken), aspect="auto", interpolation="nearest")
            axes.set_title(f"layer {layer}", fontsize=7, loc="right")
            if layer == 0:
                axes.set_title(_heading(heading, 45), fontsize=8.5, loc="left")
            axes.axis("off")
        top -= (row + 1) * body
    _draw_scale(figure, at.axes(gap + 0.1, height - 0.58, 1.9, 0.1))
    figure.savefig(path)


def routed_frames(
    path: str | os.PathLike,
    examples: Sequence[tuple[str, np.ndarray, np.ndarray]],
    title: str,
    seconds: float,
) -> None:
    """Draws spectrograms, and under each which frames each layer takes, coloured by weight.

    Args:
        path: the PNG file to write.
        examples: (heading, spectrogram [windows, bins], weights [layers, frames]) of each; 0: not
            taken.
        title: above the picture.
        seconds: of a frame.
    """
    sound, count = 0.95, len(examples[0][2])
    body = sound + 0.05 + count * _LAYER
    width, left = 11.0, 0.7
    height = _HEADER + len(examples) * (_TITLE + body + _TICKS) + 0.15
    figure = _figure(width, height, title)
    at = _Inches(figure)
    top = height - _HEADER
    for heading, spectrogram, weights in examples:
        top -= _TITLE
        end = weights.shape[1] * seconds
        upper = at.axes(left, top - sound, width - left - 0.2, sound)
        extent = (0, end, 0, 1)
        upper.imshow(spectrogram.T, aspect="auto", origin="lower", cmap="gray", extent=extent)
        upper.set_title(_heading(heading), fontsize=8.5, loc="left", pad=3)
        upper.set_ylabel("mel bin", fontsize=7)
        upper.set_xticks([])
        upper.set_yticks([])
        lower = at.axes(left, top - body, width - left - 0.2, count * _LAYER)
        _draw_map(lower, weights, extent=(0, end, len(weights) - 0.5, -0.5))
        top -= body + _TICKS
    lower.set_xlabel("seconds", fontsize=7)
    _draw_scale(figure, at.axes(left, height - 0.58, 1.9, 0.1))
    figure.savefig(path)


def _figure(width: float, height: float, title: str) -> Figure:
    """A figure of so many inches with a title."""
    figure = Figure(figsize=(width, height), dpi=130)
    FigureCanvasAgg(figure)
    figure.suptitle(_heading(title), fontsize=11, y=1 - 0.1 / height)
    return figure


class _Inches:
    """Places axes of a figure in inches from its lower left corner."""

    def __init__(self, figure: Figure):
        self._figure, self._size = figure, np.tile(figure.get_size_inches(), 2)

    def axes(self, *place: float):
        """New axes at left, bottom, width, height."""
        return self._figure.add_axes(place / self._size)

    def point(self, *place: float) -> tuple[float, float]:
        """A place as the figure counts it."""
        return tuple(place / self._size[:2])


def _heading(text: str, most: int = _HEADING) -> str:
    """A text on one line, cut to so many characters."""
    text = " ".join(text.split())
    return plain(text if len(text) <= most else f"{text[: most - 3]}...")


def _placed(tokens, max_lines, max_columns) -> Iterator[tuple[int, int, str, int]]:
    """(line, column, character, number of its token) of a text's characters that are shown."""
    line = column = 0
    for number, token in enumerate(tokens):
        for character in token:
            if column == max_columns and character != "\n":
                line, column = line + 1, 0
            if line == max_lines:
                return
            if character == "\n":
                line, column = line + 1, 0
            else:
                yield line, column, character, number
                column += 1


def _count_color(share: float):
    """The colour of a token that this share of the layers takes."""
    return _COUNTS(_DARKEST * share) if share else "white"


def _draw_listing(axes, cells, weights, max_columns):
    """The text; a token's shade is the share of layers that take it."""
    share = (weights > 0).mean(axis=0)
    axes.set(xlim=(0, max_columns), ylim=(1 + max((line for line, *_ in cells), default=0), 0))
    axes.axis("off")
    for line, column, character, number in cells:
        color = _count_color(share[number])
        axes.add_patch(Rectangle((column, line), 1, 1, facecolor=color, linewidth=0))
        axes.text(
            column + 0.5,
            line + 0.78,
            plain(character),
            family="monospace",
            fontsize=_FONT_SIZE,
            ha="center",
        )


def _draw_counts(figure, at, left, count):
    """What the shades of a listing mean."""
    shown = range(0, count + 1, -(-count // 8))
    patches = [Patch(facecolor=_count_color(n / count), edgecolor="0.4", label=n) for n in shown]
    figure.legend(
        handles=patches,
        title="layers that take a token",
        ncols=len(patches),
        loc="upper left",
        bbox_to_anchor=at.point(left - 0.1, figure.get_figheight() - 0.25),
        fontsize=7,
        title_fontsize=7,
        frameon=False,
        handlelength=1.2,
        columnspacing=0.9,
        alignment="left",
        borderpad=0,
    )


def _draw_scale(figure, axes):
    """What the colours mean, in axes of their own."""
    bar = figure.colorbar(ScalarMappable(cmap=_WEIGHTS), cax=axes, orientation="horizontal")
    bar.set_ticks([0, 0.5, 1])
    axes.tick_params(labelsize=7, length=2, pad=1)
    axes.set_title("routing weight", fontsize=7, loc="left", pad=2)
    axes.legend(
        handles=[Patch(facecolor=str(_NOT_TAKEN), label="not taken")],
        loc="center left",
        bbox_to_anchor=(1.05, 0.5),
        fontsize=7,
        frameon=False,
        handlelength=1.2,
        borderpad=0,
    )


def _tinted(image, weights):
    """The image in grey: what is taken has the colour of its weight, the rest is dimmed."""
    height, width = image.shape[:2]
    rows = np.arange(height) * weights.shape[0] // height
    columns = np.arange(width) * weights.shape[1] // width
    weights = weights[rows][:, columns]
    grey = image.mean(axis=-1, keepdims=True) / 255
    return grey * np.where(weights[..., None] > 0, _WEIGHTS(weights)[..., :3], _NOT_TAKEN)


def _draw_map(axes, weights, extent=None):
    """The weights, one row per layer; `extent` is matplotlib's, None to count tokens."""
    axes.set_facecolor(str(_NOT_TAKEN))
    axes.imshow(
        np.ma.masked_equal(weights, 0),
        aspect="auto",
        cmap=_WEIGHTS,
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=extent,
    )
    named = range(0, len(weights), -(-len(weights) // _NAMED_LAYERS))
    axes.set_yticks(named, [f"layer {i}" for i in named], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    if extent is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
