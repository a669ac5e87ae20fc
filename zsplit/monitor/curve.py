"""A loss curve of any number of steps in bounded memory, and its picture in braille dots."""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite

from zsplit.monitor.figures import loss

LABEL = 7
"""Cells of a label of the y axis."""

HIGHEST = 1e30
"""Larger values are drawn as this one: sums and differences of drawn values stay finite."""

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a braille character, by column and by row from the top (Unicode, Braille Patterns)."""


class Curve:
    """A series that keeps at most `capacity` means of equally many neighbouring values.

    When it is full, neighbours are averaged in pairs and each mean stands for twice as many values: a
    million steps take no more room than a thousand, and none is left out of its mean.
    """

    def __init__(self, capacity: int = 1024) -> None:
        if capacity < 2 or capacity % 2:
            raise ValueError("capacity must be even and at least 2")
        self.capacity = capacity
        self.count = 0
        self.stride = 1
        self._means: list[float] = []
        self._sum = 0.0
        self._pending = 0

    def add(self, value: float) -> None:
        """Append one value; one that is not finite counts as a step and leaves no dot."""
        self.count += 1
        if not isfinite(value):
            return
        self._sum += min(HIGHEST, max(-HIGHEST, value))
        self._pending += 1
        if self._pending == self.stride:
            self._means.append(self._sum / self._pending)
            self._sum, self._pending = 0.0, 0
            if len(self._means) == self.capacity:
                self._halve()

    def points(self) -> list[float]:
        """Return the means, oldest first; the last may stand for fewer values than the others."""
        return [*self._means, self._sum / self._pending] if self._pending else list(self._means)

    def _halve(self) -> None:
        pairs = zip(self._means[::2], self._means[1::2], strict=True)
        self._means = [(a + b) / 2 for a, b in pairs]
        self.stride *= 2


def draw(points: Sequence[float], width: int, height: int) -> list[str]:
    """Return `height` lines of `width` cells: labels of the y axis, the axis, and the curve.

    Points are those of a `Curve`. The picture is empty where there are none, or no room for one (less than 10
    cells, or no line).
    """
    columns = 2 * (width - LABEL - 2)
    if not points or columns < 2 or height < 1:
        return [" " * width] * height
    low, high = min(points), max(points)
    rows = _rows(_resample(points, columns), low, high, 4 * height)
    labels = _labels(low, high, height)
    return [f"{label:>{LABEL}} │{line}" for label, line in zip(labels, _braille(rows, height), strict=True)]


def _resample(points: Sequence[float], columns: int) -> list[float]:
    """Return one value for each column of dots: means where points are many, straight lines where few."""
    if len(points) >= columns:
        edges = [column * len(points) // columns for column in range(columns + 1)]
        return [sum(points[a:b]) / (b - a) for a, b in pairwise(edges)]
    last = len(points) - 1
    return [_between(points, column * last / (columns - 1)) for column in range(columns)]


def _between(points: Sequence[float], place: float) -> float:
    left = min(int(place), len(points) - 1)
    right = min(left + 1, len(points) - 1)
    part = place - left
    return points[left] * (1 - part) + points[right] * part


def _rows(values: Sequence[float], low: float, high: float, dots: int) -> list[int]:
    """Return the row of each value, counted from the top; a flat curve lies in the middle."""
    if high == low:
        return [dots // 2] * len(values)
    shares = [(high - value) / (high - low) for value in values]
    return [min(dots - 1, max(0, round(share * (dots - 1)))) for share in shares]


def _braille(rows: Sequence[int], height: int) -> list[str]:
    """Return the curve as lines of text: neighbouring dots are joined by upright strokes."""
    cells = [[0] * (len(rows) // 2) for _ in range(height)]
    before = rows[0]
    for column, row in enumerate(rows):
        step = 1 if row >= before else -1
        start = row if abs(row - before) < 2 else before + step
        for dot in range(start, row + step, step):
            cells[dot // 4][column // 2] |= _DOTS[column % 2][dot % 4]
        before = row
    return ["".join(chr(0x2800 + bits) if bits else " " for bits in line) for line in cells]


def _labels(low: float, high: float, height: int) -> list[str]:
    labels = [""] * height
    if height >= 5:
        labels[height // 2] = loss((high + low) / 2)
    labels[-1] = loss(low)
    labels[0] = loss(high)
    return labels
