"""The picture of quality over speed in a page: SVG whose points are links to their runs."""

from collections.abc import Mapping, Sequence
import html
import math
from typing import Any

from coda_jax.profiling import comparison_points, comparison_table, labels
from coda_jax.profiling.comparison_points import Point

_SHAPES = (  # markers about 12 wide, around 0
    "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z",
    "M-5 -5h10v10h-10z",
    "M0 -6.5L6.3 5H-6.3z",
    "M0 -7L6 0L0 7L-6 0z",
    "M0 6.5L6.3 -5H-6.3z",
    "M-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "M0 -6.5L6.4 -1.6L4 6H-4L-6.4 -1.6z",
)
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 46  # margins
_CHARACTER, _LINE = 6.9, 16  # the most that a character of a label takes, on average; its height


def escaped(text: str) -> str:
    """A text as HTML that says it, in an element or in an attribute with quotes."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def marker(index: int) -> str:
    """A recipe's marker, as what stands in an SVG."""
    shape = _SHAPES[index % len(_SHAPES)]
    color = comparison_points.COLORS[index % len(comparison_points.COLORS)]
    return f'<path class="marker" fill="{color}" d="{shape}"/>'


def picture(report: Mapping[str, Any], width: int, height: int) -> str:
    """The SVG; the point of recipe i is a link to `#run-i`.

    Args:
        report: report.json.
        width: in pixels, in which its text has 12.
        height: in pixels.
    """
    found, levels = comparison_points.points(report), comparison_points.levels(report)
    speeds, qualities = comparison_points.limits(found, list(levels.values()))
    frame = (_LEFT, _TOP, width - _RIGHT, height - _BOTTOM)

    def at(speed, quality):
        across = math.log(speed / speeds[0]) / math.log(speeds[1] / speeds[0])
        up = (quality - qualities[0]) / (qualities[1] - qualities[0])
        x = frame[0] + across * (frame[2] - frame[0])
        return round(x, 1), round(frame[3] - up * (frame[3] - frame[1]), 1)

    best = comparison_points.front(found, report.get("better", "max"))
    ends = [at(p.speed, p.quality) for p in best]
    across = [[(x, at(1, level)[1]) for x in frame[::2]] for level in levels.values()]
    parts = [
        _axes(report, frame, at, speeds, qualities),
        *(_line(line, "level") for line in across),
        _line(ends, "front"),
        _labelled(report, found, dict(zip(levels, across, strict=True)), frame, at, ends),
    ]
    metric = comparison_table.metric_name(report)
    title = f"{metric} over {comparison_points.speed_axis(report)}"
    title += f"; on the Pareto front: {', '.join(p.name for p in best)}"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="group" aria-label="{escaped(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _axes(report, frame, at, speeds, qualities) -> str:
    """Grid lines, their numbers and what they are."""
    x0, y0, x1, y1 = frame
    parts = []
    for speed in labels.ticks(*speeds, ratio=True):
        x, _ = at(speed, qualities[0])
        parts.append(_line([(x, y0), (x, y1)], "grid"))
        parts.append(f'<text x="{x}" y="{y1 + 17}" text-anchor="middle">{speed:.3g}x</text>')
    for quality in labels.ticks(*qualities):
        _, y = at(1, quality)
        parts.append(_line([(x0, y), (x1, y)], "grid"))
        parts.append(f'<text x="{x0 - 6}" y="{y + 4}" text-anchor="end">{quality:.4g}</text>')
    metric = f"{comparison_table.metric_name(report)}, % ({comparison_table.direction(report)})"
    upright = f'transform="translate(13 {(y0 + y1) / 2}) rotate(-90)"'
    parts.append(f'<text {upright} text-anchor="middle">{escaped(metric)}</text>')
    below = f'x="{(x0 + x1) / 2}" y="{y1 + 37}" text-anchor="middle"'
    parts.append(f"<text {below}>encoder over {comparison_table.DENSE}</text>")
    return f'<g aria-hidden="true">{"".join(parts)}</g>'


def _labelled(report, found, levels, frame, at, ends) -> str:
    """The points with bars and names, and the names of other levels, whose lines are given."""
    names = [*(p.name for p in found), *levels]
    sizes = [(len(name) * _CHARACTER, _LINE) for name in names]
    anchors = [at(p.speed, p.quality) for p in found]
    for (width, _), line in zip(sizes[len(found) :], levels.values(), strict=True):
        anchors.append((line[0][0] + 4 + width / 2, line[0][1]))
    bars = [_bars(point, at) for point in found]
    lines = [ends, *levels.values(), *(line for both in bars for line in both)]
    obstacles = [box for line in lines for box in labels.along(line)]
    placed = labels.place(anchors, sizes, frame, obstacles, radius=8)
    parts = []
    for i, (name, anchor, box) in enumerate(zip(names, anchors, placed, strict=True)):
        x, y = (box[0] + box[2]) / 2, box[1] + 12
        label = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escaped(name)}</text>'
        end = labels.leader(anchor, box, radius=8)
        label = (_line([anchor, end], "leader") if end else "") + label
        if i < len(found):
            label = _point(report, found[i], anchor, bars[i], label)
        parts.append(label)
    return "".join(parts)


def _point(report, point: Point, anchor, bars, label: str) -> str:
    """A point as a link, whose name says its numbers."""
    quality = comparison_table.quality(report["recipes"][point.name]).text
    metric = comparison_table.metric_name(report)
    says = f"{point.name}: {metric} {quality}, encoder {point.speed:.2f}x"
    lines = "".join(_line(line, "bar") for line in bars)
    x, y = anchor
    return (
        f'<a class="to-run" href="#run-{point.index}" aria-label="{escaped(says)}">{lines}{label}'
        f'<g transform="translate({x} {y})"><circle class="target" r="11"/>'
        f"{marker(point.index)}</g></a>"
    )


def _bars(point: Point, at) -> list[list[tuple[float, float]]]:
    """The ends of the lines for the standard error and the quartiles."""
    error = [at(point.speed, point.quality + sign * point.error) for sign in (-1, 1)]
    return [error, [at(speed, point.quality) for speed in point.quartiles]]


def _line(ends: Sequence[tuple[float, float]], kind: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in ends)
    return f'<path class="{kind}" d="M{path}"/>' if path else ""
