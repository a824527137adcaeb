"""Ranges of token positions, sets of them, and the positions of packed documents.

A set is a tuple of sorted ranges that neither touch nor overlap. It describes positions of a sequence, and also rows of
a buffer that holds some of these positions in ascending order.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple


class TokenRange(NamedTuple):
    """A half-open range [begin, end) of positions or rows."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.end - self.begin

    def slice(self) -> slice:
        """Return the range as a slice."""
        return slice(self.begin, self.end)

    def shifted(self, by: int) -> "TokenRange":
        """Return the range moved by some positions."""
        return TokenRange(self.begin + by, self.end + by)


TokenRanges = tuple[TokenRange, ...]


def union(ranges: Iterable[TokenRange]) -> TokenRanges:
    """Return the union of ranges in any order, as a set."""
    merged: list[TokenRange] = []
    for one in sorted(ranges):
        if one.size <= 0:
            continue
        if merged and one.begin <= merged[-1].end:
            merged[-1] = TokenRange(merged[-1].begin, max(merged[-1].end, one.end))
        else:
            merged.append(one)
    return tuple(merged)


def intersection(left: TokenRanges, right: TokenRanges) -> TokenRanges:
    """Return the positions that are in both sets."""
    overlaps: list[TokenRange] = []
    i = j = 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i].begin, right[j].begin), min(left[i].end, right[j].end)
        if begin < end:
            overlaps.append(TokenRange(begin, end))
        if left[i].end < right[j].end:
            i += 1
        else:
            j += 1
    return tuple(overlaps)


def difference(left: TokenRanges, right: TokenRanges) -> TokenRanges:
    """Return the positions of the left set that are not in the right one."""
    if not left:
        return ()
    edges = [left[0].begin, *(edge for one in right for edge in one), left[-1].end]
    gaps = (TokenRange(edges[i], edges[i + 1]) for i in range(0, len(edges), 2))
    return intersection(left, tuple(gap for gap in gaps if gap.size > 0))


def size(ranges: TokenRanges) -> int:
    """Return the number of positions in a set."""
    return sum(one.size for one in ranges)


class RowFinder:
    """Finds rows in a buffer that holds a set of positions, by bisection: for many look-ups in one buffer.

    Args:
        ranges: positions that the buffer holds, in the order of its rows.
    """

    def __init__(self, ranges: TokenRanges) -> None:
        self._ranges = ranges
        self._begins = [one.begin for one in ranges]
        self._rows = list(accumulate((one.size for one in ranges), initial=0))

    def before(self, bound: int) -> int:
        """Return how many positions of the set are below a bound: the row of `bound`."""
        index = bisect_left(self._begins, bound)
        if index == 0:
            return 0
        last = self._ranges[index - 1]
        return self._rows[index - 1] + min(last.end, bound) - last.begin

    def clip(self, begin: int, end: int) -> TokenRanges:
        """Return the part of the set that lies in [begin, end)."""
        first = max(0, bisect_right(self._begins, begin) - 1)
        near = self._ranges[first : bisect_left(self._begins, end)]
        cut = (TokenRange(max(one.begin, begin), min(one.end, end)) for one in near)
        return tuple(one for one in cut if one.size > 0)

    def positions(self, rows: TokenRange) -> TokenRanges:
        """Return the positions that some consecutive rows of the buffer hold."""
        found, index, row = [], bisect_right(self._rows, rows.begin) - 1, rows.begin
        while row < rows.end:
            span = self._ranges[index]
            begin = span.begin + row - self._rows[index]
            found.append(TokenRange(begin, min(span.end, begin + rows.end - row)))
            row += found[-1].size
            index += 1
        return tuple(found)


@lru_cache(maxsize=128)
def rows_of(buffer: TokenRanges, positions: TokenRanges) -> TokenRanges:
    """Return the rows at which a buffer holds some positions.

    Args:
        buffer: positions that the buffer holds, in the order of its rows.
        positions: positions to find.

    Raises:
        ValueError: The buffer does not hold all wanted positions.
    """
    missing = difference(positions, buffer)
    if missing:
        raise ValueError(
            f"the buffer holds positions {_shown(buffer)}, but not {_shown(missing)} of {_shown(positions)}"
        )
    row = RowFinder(buffer).before
    return union(TokenRange(row(one.begin), row(one.end)) for one in positions)


def _shown(ranges: TokenRanges) -> str:
    few = ", ".join(str(tuple(one)) for one in ranges[:8])
    return f"[{few}]" if len(ranges) <= 8 else f"[{few}, and {len(ranges) - 8} more]"


class DocumentSpan(NamedTuple):
    """Positions [begin, end) that belong to the document whose first position is `start`."""

    begin: int
    end: int
    start: int


def _begin_of(span: DocumentSpan) -> int:
    return span.begin


@dataclass(frozen=True, slots=True)
class Documents:
    """Packed documents of a micro-batch.

    Attributes:
        spans: for every sequence of the batch, the spans of its documents in order and without gaps.
        plans: what has been planned for these documents (`cached_plan`); it is freed with them.

    Raises:
        ValueError: A span is empty, out of order, or starts after its first position.
    """

    spans: tuple[tuple[DocumentSpan, ...], ...]
    plans: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for sequence, spans in enumerate(self.spans):
            for number, span in enumerate(spans):
                follows = number == 0 or (span.begin == spans[number - 1].end and span.start == span.begin)
                if not (0 <= span.start <= span.begin < span.end and follows):
                    raise ValueError(
                        f"sequence {sequence} of the batch: document span {tuple(span)} (begin, end, start) does not "
                        f"continue {tuple(spans[number - 1]) if number else 'the sequence'}; documents must be "
                        "contiguous, and each must start at its own first position"
                    )

    def within(self, sequence: int, positions: TokenRange) -> tuple[DocumentSpan, ...]:
        """Return the document spans of a sequence, clipped to some positions.

        Args:
            sequence: index of the sequence in the batch.
            positions: token positions of that sequence.

        Raises:
            ValueError: Some of the positions belong to no document.
        """
        spans = self.spans[sequence]
        if not spans or spans[0].begin > positions.begin or spans[-1].end < positions.end:
            known = f"{spans[0].begin} to {spans[-1].end}" if spans else "none"
            raise ValueError(
                f"sequence {sequence} of the batch: attention covers positions {positions.begin} to {positions.end}, "
                f"but documents are known only for {known}; read them from the mask of the whole sequence"
            )
        first = bisect_right(spans, positions.begin, key=_begin_of) - 1
        near = spans[first : bisect_left(spans, positions.end, key=_begin_of)]
        clipped = (
            DocumentSpan(max(span.begin, positions.begin), min(span.end, positions.end), span.start) for span in near
        )
        return tuple(span for span in clipped if span.begin < span.end)
