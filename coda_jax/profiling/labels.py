"""Labels of a picture, and where they and ticks stand; y may point up or down."""

from collections.abc import Iterator, Sequence
import itertools
import math

from jaxtyping import Float
import numpy as np

Box = tuple[float, float, float, float]  # x and y of two opposite corners, the smaller ones first


def plain(text: str) -> str:
    """A text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def ticks(low: float, high: float, ratio: bool = False) -> list[float]:
    """Round numbers of a range, three to eight where that can be.

    Args:
        low: end of the range.
        high: the other, above it.
        ratio: the axis is logarithmic.
    """
    for candidates in _candidates(low, high, ratio):
        found = [x for x in candidates if low <= x <= high]
        if 3 <= len(found) <= 8:
            return found
    return [low, high]


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    obstacles: Sequence[Box] = (),
    radius: float = 6.0,
) -> list[Box]:
    """Places labels beside their anchors, clear of each other where there is room.

    Args:
        anchors: x and y of what is labelled.
        sizes: width and height of each label.
        bounds: where all labels have to be.
        obstacles: what they should not cover, beside the anchors.
        radius: of an anchor's marker.

    Returns:
        The boxes of the labels.
    """
    markers = [(x - radius, y - radius, x + radius, y + radius) for x, y in anchors]
    taken = [*markers, *obstacles]
    for anchor, (width, height) in zip(anchors, sizes, strict=True):
        boxes, distances = zip(*_places(anchor, (width, height), radius), strict=True)
        covered = _overlaps(boxes, taken).sum(axis=1)
        outside = width * height - _overlaps(boxes, [bounds])[:, 0]
        taken.append(boxes[np.argmin(covered + 10 * outside + distances)])
    return taken[len(taken) - len(anchors) :]


def leader(
    anchor: tuple[float, float], box: Box, radius: float = 6.0
) -> tuple[float, float] | None:
    """Where a line from an anchor to its label ends; None: the label is near enough without."""
    x, y = anchor
    end = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
    return end if math.dist(anchor, end) > 3 * radius else None


def along(ends: Sequence[tuple[float, float]], step: float = 6.0) -> list[Box]:
    """Small boxes along a line through points, as obstacles of labels."""
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(ends):
        count = max(1, round(math.dist((x0, y0), (x1, y1)) / step))
        for i in range(count + 1):
            x, y = x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count
            boxes.append((x - 1, y - 1, x + 1, y + 1))
    return boxes


def _candidates(low, high, ratio) -> Iterator[list[float]]:
    """Sets of ticks; the first one that fits is taken."""
    if ratio:
        tens = [
            10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ]
        for steps in ((1, 1.5, 2, 3, 4, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,)):
            yield [ten * step for ten in tens for step in steps]
    power = 10.0 ** math.floor(math.log10(high - low))
    for step in (2 * power, power, power / 2, power / 5):
        first = math.ceil(low / step)
        yield [i * step for i in range(first, math.floor(high / step) + 1)]


def _places(anchor, size, radius) -> Iterator[tuple[Box, float]]:
    """(box, distance) of labels around an anchor, from the nearest and from the right on."""
    (x, y), (width, height) = anchor, size
    for gap in (4, 12, 24, 40, 60, 85, 115, 150):
        for turn in range(16):
            angle = (turn + 1) // 2 * math.pi / 8 * (-1) ** turn
            across, up = math.cos(angle), math.sin(angle)
            left = x + across * (radius + gap + width / 2) - width / 2
            low = y + up * (radius + gap + height / 2) - height / 2
            yield (left, low, left + width, low + height), gap + turn / 4


def _overlaps(boxes: Sequence[Box], others: Sequence[Box]) -> Float[np.ndarray, "boxes others"]:
    """The areas that boxes share with others."""
    one, other = np.array(boxes, float)[:, None], np.array(others, float)[None]
    shared = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    return shared.clip(min=0).prod(axis=-1)
