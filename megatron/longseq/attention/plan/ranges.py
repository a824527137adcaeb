"""Ranges of token positions, sets of them, and the positions of packed documents.

A set is a tuple of sorted ranges that neither touch nor overlap. It describes positions of a sequence, and also rows of
a buffer that holds some of these positions in ascending order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


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
    overlaps = (TokenRange(max(a.begin, b.begin), min(a.end, b.end)) for a in left for b in right)
    return tuple(one for one in overlaps if one.size > 0)


def difference(left: TokenRanges, right: TokenRanges) -> TokenRanges:
    """Return the positions of the left set that are not in the right one."""
    if not left:
        return ()
    edges = [left[0].begin, *(edge for one in right for edge in one), left[-1].end]
    gaps = [TokenRange(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]
    return intersection(left, tuple(gap for gap in gaps if gap.size > 0))


def size(ranges: TokenRanges) -> int:
    """Return the number of positions in a set."""
    return sum(one.size for one in ranges)


def clip(ranges: TokenRanges, begin: int, end: int) -> TokenRanges:
    """Return the part of a set that lies in [begin, end)."""
    return intersection(ranges, (TokenRange(begin, end),)) if begin < end else ()


def count_before(ranges: TokenRanges, bound: int) -> int:
    """Return how many positions of a set are below a bound, which is the row of `bound` in a buffer of the set."""
    return sum(min(one.end, bound) - one.begin for one in ranges if one.begin < bound)


def rows_of(buffer: TokenRanges, wanted: TokenRanges) -> TokenRanges:
    """Return the rows at which a buffer holds some positions.

    Args:
        buffer: positions that the buffer holds, in the order of its rows.
        wanted: positions to find.

    Raises:
        ValueError: The buffer does not hold all wanted positions.
    """
    missing = difference(wanted, buffer)
    if missing:
        raise ValueError(f"the buffer holds positions {_shown(buffer)}, but not {_shown(missing)} of {_shown(wanted)}")
    return union(TokenRange(count_before(buffer, one.begin), count_before(buffer, one.end)) for one in wanted)


def _shown(ranges: TokenRanges) -> list[tuple[int, ...]]:
    return [tuple(one) for one in ranges]


class DocumentSpan(NamedTuple):
    """Positions [begin, end) that belong to the document whose first position is `start`."""

    begin: int
    end: int
    start: int


@dataclass(frozen=True, slots=True)
class Documents:
    """Packed documents of a micro-batch.

    Attributes:
        spans: for every sequence of the batch, the spans of its documents in order and without gaps.

    Raises:
        ValueError: A span is empty, out of order, or starts after its first position.
    """

    spans: tuple[tuple[DocumentSpan, ...], ...]

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
        clipped = (
            DocumentSpan(max(span.begin, positions.begin), min(span.end, positions.end), span.start) for span in spans
        )
        return tuple(span for span in clipped if span.begin < span.end)
