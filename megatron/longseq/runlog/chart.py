"""Draw a curve in a terminal with characters."""

import math
from collections.abc import Sequence
from itertools import pairwise

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # braille patterns have 4 rows of 2 dots
_BLANK = 0x2800


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most `most` points (x, value): means of equal pieces, without values that are not finite.

    Args:
        points: (x, value).
        most: largest number of points of the result.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) <= most:
        return finite
    ends = [round(index * len(finite) / most) for index in range(most + 1)]
    pieces = [finite[begin:end] for begin, end in pairwise(ends)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """Return the lines of a curve, which joins its points.

    Args:
        values: from left to right.
        width, height: characters.

    Returns:
        `height` lines; the first has the largest value at its end, the last the smallest. Without a finite value: none.
    """
    points = [value for _, value in thin([(0.0, value) for value in values], 2 * width)]
    if not points:
        return []
    low, high = min(points), max(points)
    scale = (4 * height - 1) / (high - low) if high > low else 0.0
    rows = [round((high - _between(points, column / (2 * width - 1))) * scale) for column in range(2 * width)]
    cells = [[0] * width for _ in range(height)]
    for column, (before, row) in enumerate(zip([rows[0], *rows], rows, strict=False)):
        for level in range(min(before + (before < row), row), max(before - (before > row), row) + 1):
            cells[level // 4][column // 2] |= _DOTS[level % 4][column % 2]
    lines = ["".join(chr(_BLANK + cell) for cell in row) for row in cells]
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    return [f"{line} {labels.get(row, '')}".rstrip() for row, line in enumerate(lines)]


def _between(points: Sequence[float], share: float) -> float:
    """Return the value at a share of the way from the first point to the last."""
    at = share * (len(points) - 1)
    left = min(int(at), max(0, len(points) - 2))
    right = min(left + 1, len(points) - 1)
    return points[left] + (at - left) * (points[right] - points[left])
