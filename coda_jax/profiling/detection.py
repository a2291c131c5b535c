"""A picture of scores: histograms of what is in and out of distribution, and ROC curves."""

from collections.abc import Mapping, Sequence
import os

import numpy as np

from coda_jax.optional import needs

with needs("images"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

_BINS = 40
_LONGEST = 40  # characters of a name


def detection_picture(
    path: str | os.PathLike,
    names: Sequence[str],
    scores: Sequence[Mapping[str, np.ndarray]],
    title: str,
) -> None:
    """Draws for each score a histogram of every set, and the ROC curves beside it.

    Args:
        path: the PNG file to write.
        names: of the sets, the one in distribution first.
        scores: {score: one number for each input} of each set; higher means in distribution.
        title: above the picture.
    """
    with needs():
        from sklearn.metrics import roc_auc_score, roc_curve

    inside, *outside = scores
    figure = Figure(figsize=(9, 2.1 * len(inside) + 0.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_shown(title), fontsize=10)
    rows = figure.subplots(len(inside), 2, squeeze=False, width_ratios=[2, 1])
    for (histogram, roc), score in zip(rows, inside, strict=True):
        every = np.concatenate([of_set[score] for of_set in scores])
        edges = np.histogram_bin_edges(every, _BINS)
        for name, of_set in zip(names, scores, strict=True):
            weights = np.broadcast_to(1 / len(of_set[score]), of_set[score].shape)
            style = {"histtype": "step", "linewidth": 1.3, "label": _shown(name)}
            histogram.hist(of_set[score], edges, weights=weights, **style)
        histogram.set_title(f"{score} (higher: in distribution)", fontsize=8, loc="left")
        histogram.set_ylabel("share of inputs", fontsize=7)
        roc.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        roc.plot([], [])  # the colour of what is in distribution
        for of_set in outside:
            kinds = np.repeat([1, 0], [len(inside[score]), len(of_set[score])])
            values = np.concatenate([inside[score], of_set[score]])
            false, true, _ = roc_curve(kinds, values)
            area = f"AUROC {roc_auc_score(kinds, values):.3f}"
            roc.plot(false, true, linewidth=1.3, label=area)
        roc.set_xlabel("false positive rate", fontsize=7)
        roc.set_ylabel("true positive rate", fontsize=7)
        roc.legend(fontsize=6, loc="lower right", frameon=False)
        for axes in (histogram, roc):
            axes.tick_params(labelsize=6)
    rows[0][0].legend(fontsize=6, frameon=False)
    figure.savefig(path, format="png")


def _shown(name: str) -> str:
    """A name on one short line, without matplotlib's formulas."""
    text = " ".join(name.split())
    text = text if len(text) <= _LONGEST else f"...{text[3 - _LONGEST :]}"
    return text.replace("$", r"\$")
