"""Quality over speed as points: where they are, and which are on the Pareto front."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from coda_jax.profiling.comparison_table import DENSE, number, speed_key, timed

# Okabe and Ito's colours without black and yellow, which vanish on dark and on white paper.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclasses.dataclass(frozen=True)
class Point:
    """A recipe in the picture.

    Attributes:
        index: of the recipe in the report, which gives it colour and marker.
        name: of the recipe.
        speed: median speed-up of the encoder against the dense model, at the first timing.
        quartiles: lower and upper, of the speed-up.
        quality: the mean of the metric.
        error: its standard error, 0 for one seed.
    """

    index: int
    name: str
    speed: float
    quartiles: tuple[float, float]
    quality: float
    error: float


def points(report: Mapping[str, Any]) -> list[Point]:
    """The recipes that have both numbers."""
    found = []
    for index, (name, recipe) in enumerate((report.get("recipes") or {}).items()):
        for place in timed(report)[:1]:
            path = ("speed", speed_key(*place), "encoder_speed_up", DENSE)
            speed, low, high = (number(recipe, *path, i) for i in range(3))
            quality = number(recipe, "mean")
            if quality is None or speed is None or speed <= 0:
                continue
            ends = [end for end in (low, speed, high) if end is not None and end > 0]
            quartiles = (min(ends), max(ends))
            error = number(recipe, "error") or 0.0
            found.append(Point(index, name, speed, quartiles, quality, error))
    return found


def front(found: Sequence[Point], better: str) -> list[Point]:
    """The points to which no other is superior in one and at least equal in the other; by speed.

    Args:
        found: all points.
        better: "max" or "min", which quality is a good one.
    """
    sign = -1 if better == "min" else 1
    best, kept = -math.inf, []
    for point in sorted(found, key=lambda p: (p.speed, sign * p.quality), reverse=True):
        if sign * point.quality > best:
            best = sign * point.quality
            kept.append(point)
    return kept[::-1]


def speed_axis(report: Mapping[str, Any]) -> str:
    """What the speeds are."""
    text = f"speed-up of the encoder over the {DENSE}"
    for batch, length in timed(report)[:1]:
        text += f" (batch {batch}, input length {length:,})"
    return text


def limits(
    found: Sequence[Point], levels: Sequence[float] = ()
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Both ends of the logarithmic axis of speeds, and of that of qualities.

    Args:
        found: what has to be in the picture, with its bars.
        levels: qualities that have to be, too.
    """
    speeds = [end for p in found for end in p.quartiles] or [1.0]
    qualities = [p.quality + sign * p.error for p in found for sign in (-1, 1)]
    qualities = [*qualities, *levels] or [0.0, 100.0]
    wider = max(max(speeds) / min(speeds), 1.25) ** 0.12
    margin = 0.12 * max(max(qualities) - min(qualities), 0.5)
    return (
        (min(speeds) / wider, max(speeds) * wider),
        (min(qualities) - margin, max(qualities) + margin),
    )


def levels(report: Mapping[str, Any]) -> dict[str, float]:
    """The quality of methods of others, whose speed is not known."""
    names = report.get("baselines") or ()
    found = {name: number(report, "baselines", name) for name in names}
    return {name: quality for name, quality in found.items() if quality is not None}
