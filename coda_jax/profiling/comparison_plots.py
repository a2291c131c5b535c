"""Pictures of a comparison: quality over speed, and what training did."""

from collections.abc import Mapping, Sequence
import os
from typing import Any

import numpy as np

from coda_jax.optional import needs
from coda_jax.profiling import comparison_points, comparison_table, labels
from coda_jax.profiling.comparison_points import Point

with needs("images"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

_MARKERS = "osD^vP*Xhp<>d8"
_LINES = ("-", "--", "-.", ":")
_GREY = "0.45"
_HALO = (withStroke(linewidth=2.5, foreground="white"),)


def quality_over_speed(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Draws each recipe's quality over the speed-up of its encoder, and the Pareto front.

    Vertical bars are standard errors, horizontal ones the quartiles of the timing. Methods of
    others, whose speed is not known, are lines across.

    Args:
        path: the PNG file to write, 1,200 pixels wide and 780 high.
        report: report.json.
    """
    figure = Figure(figsize=(8, 5.2), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.115, 0.895, 0.805))
    found = comparison_points.points(report)
    levels = comparison_points.levels(report)
    metric = comparison_table.metric_name(report)
    title = f"{metric} over speed: {report.get('task', '')}".rstrip(": ")
    axes.set_title(labels.plain(title), loc="left")
    axes.set_ylabel(f"{metric}, % ({comparison_table.direction(report)})")
    axes.set_xlabel(comparison_points.speed_axis(report))
    axes.spines[["top", "right"]].set_visible(False)
    _set_limits(axes, found, list(levels.values()))
    best = comparison_points.front(found, report.get("better", "max"))
    ends = [(p.speed, p.quality) for p in best]
    axes.plot(*np.reshape(ends, (-1, 2)).T, color=_GREY, linewidth=1.2, zorder=1)
    for point in found:
        _draw_point(axes, point)
    for level in levels.values():
        axes.axhline(level, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    _draw_labels(axes, found, levels, ends)
    figure.savefig(path)


def learning_curves(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Draws the losses of evaluations and of training over steps, a line for each recipe.

    Lines are means over the seeds that have a step. Thin ones are each seed's; the loss of training
    is a running mean.

    Args:
        path: the PNG file to write, 1,500 pixels wide.
        report: report.json.
    """
    recipes = report.get("recipes") or {}
    columns = min(max(130 // (8 + max(map(len, recipes), default=0)), 1), 4)  # of the names
    rows = -(-len(recipes) // columns)
    height = 4.3 + 0.22 * rows
    figure = Figure(figsize=(10, height), dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(
        left=0.07, right=0.985, top=1 - 0.4 / height, bottom=(0.6 + 0.22 * rows) / height
    )
    titles = {"loss of evaluations": "eval/loss", "loss of training, smoothed": "loss"}
    for axes, (title, name) in zip(panels, titles.items(), strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        for index, recipe in enumerate(recipes.values()):
            _draw_curves(axes, index, _curves(recipe, name), smooth=name == "loss")
        axes.set_xlim(left=0)
    handles = [
        panels[0].plot([], [], label=labels.plain(name), **_style(index))[0]
        for index, name in enumerate(recipes)
    ]
    if handles:
        figure.legend(
            handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8.5
        )
    figure.savefig(path)


def _set_limits(axes: Axes, found: Sequence[Point], levels: Sequence[float]) -> None:
    """Room for every bar and the labels; ticks that can be read on a logarithmic axis, too."""
    (left, right), (low, high) = comparison_points.limits(found, levels)
    axes.set_xscale("log")
    axes.set(xlim=(left, right), ylim=(low, high))
    marks = labels.ticks(left, right, ratio=True)
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _style(index: int) -> dict[str, Any]:
    """Colour, marker and line of a recipe; print without colour tells them apart, too."""
    return {
        "color": comparison_points.COLORS[index % len(comparison_points.COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
        "markersize": 5,
    }


def _draw_point(axes: Axes, point: Point) -> None:
    style = _style(point.index)
    low, high = point.quartiles
    axes.errorbar(
        point.speed,
        point.quality,
        xerr=[[point.speed - low], [high - point.speed]],
        yerr=point.error or None,
        ecolor=style["color"],
        elinewidth=1.1,
        capsize=2.5,
        marker=style["marker"],
        markersize=8,
        markerfacecolor=style["color"],
        markeredgecolor="black",
        markeredgewidth=0.7,
        zorder=3,
    )


def _draw_labels(axes, found, levels, ends) -> None:
    """The names beside their points and lines; a label that had to move is led to its point."""
    texts = [axes.text(0, 0, labels.plain(p.name), fontsize=9, zorder=5) for p in found]
    texts += [
        axes.text(0, 0, labels.plain(name), fontsize=8, color="0.3", zorder=5) for name in levels
    ]
    renderer = axes.figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in texts]
    frame = axes.get_window_extent(renderer)
    to_pixels = axes.transData.transform
    anchors = [to_pixels((p.speed, p.quality)) for p in found]
    lines = [to_pixels(ends)] if ends else []
    lines += [to_pixels([(p.speed, p.quality + s * p.error) for s in (-1, 1)]) for p in found]
    lines += [to_pixels([(speed, p.quality) for speed in p.quartiles]) for p in found]
    for box, level in zip(boxes[len(found) :], levels.values(), strict=True):
        _, y = to_pixels((1, level))
        anchors.append((frame.x0 + 8 + box.width / 2, y))
        lines.append([(frame.x0, y), (frame.x1, y)])
    obstacles = [box for line in lines for box in labels.along(line)]
    sizes = [(box.width, box.height) for box in boxes]
    placed = labels.place(anchors, sizes, tuple(frame.extents), obstacles, radius=12)
    to_data = axes.transData.inverted().transform
    for text, old, new, anchor in zip(texts, boxes, placed, anchors, strict=True):
        x, y = to_pixels(text.get_position())
        text.set_position(to_data((x + new[0] - old.x0, y + new[1] - old.y0)))
        text.set_path_effects(_HALO)
        end = labels.leader(anchor, new, radius=12)
        if end:
            axes.plot(*to_data([anchor, end]).T, color=_GREY, linewidth=0.6, zorder=2)


def _curves(recipe: Mapping[str, Any], name: str) -> list[dict[int, float]]:
    """{step: value} of each seed."""
    curves = (cell.get("curve") or {} for cell in (recipe.get("cells") or {}).values())
    return [
        {int(step): float("nan") if y is None else y for step, y in curve.get(name, ())}
        for curve in curves
    ]


def _draw_curves(axes: Axes, index: int, seeds: Sequence[Mapping[int, float]], smooth: bool):
    steps = sorted(set().union(*seeds))
    table = np.array([[seed.get(step, np.nan) for step in steps] for seed in seeds], float)
    style = _style(index)
    for values in table if len(table) > 1 and not smooth else ():
        axes.plot(steps, values, color=style["color"], linewidth=0.7, alpha=0.35)
    window = max(1, len(steps) // 20) if smooth else 1
    means = [_mean(table[:, max(0, end - window) : end]) for end in range(1, len(steps) + 1)]
    axes.plot(steps, means, linewidth=1.7, markevery=max(1, len(steps) // 8), **style)


def _mean(values: np.ndarray) -> float:
    """Of the numbers among them; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return finite.mean() if finite.size else np.nan
