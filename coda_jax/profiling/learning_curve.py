"""A picture of what a run learned: its metrics over its steps."""

from collections.abc import Mapping, Sequence
import os

from coda_jax.optional import needs
from coda_jax.profiling.labels import plain

with needs("images"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

Curve = Sequence[tuple[int, float]]

# Told apart by colour-blind readers and in print: the hues of Okabe and Ito, dots and lines.
_TRAINING = {"color": "#0072B2", "linewidth": 1.1}
_EVALUATION = {"color": "#D55E00", "linewidth": 1.6, "marker": "o", "markersize": 4.5}
_FEW = 25  # points of training that are seen as points, too
_COLUMNS = 4  # panels beside each other, at most


def learning_curve(
    path: str | os.PathLike,
    training: Mapping[str, Curve],
    evaluation: Mapping[str, Curve],
    title: str,
) -> None:
    """Draws a panel for the loss and for each other metric of the evaluation.

    Args:
        path: the PNG file to write.
        training: {metric: [(step, value), ...]}.
        evaluation: the same of held-out data; none where there are none.
        title: above the picture.
    """
    names = list(dict.fromkeys(["loss", *evaluation]))
    columns = min(len(names), _COLUMNS)
    rows = -(-len(names) // columns)
    size = (0.6 + 3.7 * columns, 0.4 + 2.9 * rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(rows, columns, 1 + place) for place in range(len(names))]
    for axes, name in zip(panels, names, strict=True):
        for label, curves, style in (
            ("training", training, _TRAINING),
            ("evaluation", evaluation, _EVALUATION),
        ):
            if curve := curves.get(name):
                dots = {"marker": ".", **style} if len(curve) < _FEW else style
                axes.plot(*zip(*curve, strict=True), label=label, **dots)
        axes.set_title(name.replace("_", " "), fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(plain(title), fontsize=11)
    figure.savefig(path, format="png")
