"""Which blocks of the score matrix attention computes: planned from positions alone, nothing masked is computed.

Rows are queries, counted from the first query of the call; keys are counted from the first key of the sequence. A tile
is a range of rows (of some sequences of the batch) with the blocks of keys that it sees; the blocks' partial results
are merged by their log-sum-exp.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

STRIP = 512  # rows of a windowed tile where the kernel needs a mask: bounds the mask and the masked part


class Span(NamedTuple):
    """A half-open range."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        """Elements in it."""
        return self.end - self.begin

    def slice(self) -> slice:
        """Return it as an index."""
        return slice(self.begin, self.end)

    def moved(self, by: int) -> "Span":
        """Return it that much further."""
        return Span(self.begin + by, self.end + by)


class Run(NamedTuple):
    """Positions [begin, end) that belong to the document which starts at position `start`."""

    begin: int
    end: int
    start: int


@dataclass(frozen=True, slots=True)
class Documents:
    """Packed documents: for every sequence of the batch the runs of its positions, in order, without gaps.

    Raises:
        ValueError: a run is empty, out of order, or starts after its first position.
    """

    runs: tuple[tuple[Run, ...], ...]

    def __post_init__(self) -> None:
        for sequence, runs in enumerate(self.runs):
            for number, run in enumerate(runs):
                follows = number == 0 or (run.begin == runs[number - 1].end and run.start == run.begin)
                if not (0 <= run.start <= run.begin < run.end and follows):
                    raise ValueError(
                        f"sequence {sequence} of the batch: document run {tuple(run)} (begin, end, start) does not "
                        f"continue {tuple(runs[number - 1]) if number else 'the sequence'}: documents must follow one "
                        "another without gaps, each starting at its own first position"
                    )

    def within(self, sequence: int, span: Span) -> tuple[Run, ...]:
        """Return the runs of a sequence inside a span of positions.

        Raises:
            ValueError: part of the span belongs to no document.
        """
        runs = self.runs[sequence]
        if not runs or runs[0].begin > span.begin or runs[-1].end < span.end:
            known = f"{runs[0].begin} to {runs[-1].end}" if runs else "none"
            raise ValueError(
                f"sequence {sequence} of the batch: positions {span.begin} to {span.end} are computed, but the "
                f"documents of positions {known} are known; take them from the mask of the whole sequence"
            )
        clipped = (Run(max(run.begin, span.begin), min(run.end, span.end), run.start) for run in runs)
        return tuple(run for run in clipped if run.begin < run.end)


@dataclass(frozen=True, slots=True)
class Block:
    """Keys that a tile sees.

    Attributes:
        keys: positions of the keys.
        causal: the last row sees all keys, each row before it one key less; else every row sees all.
        window: with `causal`, a row sees at most this many keys before the one of its own position; None: all.
    """

    keys: Span
    causal: bool
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of some sequences and the blocks of keys that they see.

    Attributes:
        batch: sequences of the batch.
        rows: queries, from the first of the call.
        blocks: the first holds the rows' own positions, so every row of it sees a key.
    """

    batch: Span
    rows: Span
    blocks: tuple[Block, ...]


@lru_cache(maxsize=512)
def plan_causal(
    queries: Span,
    batch: int,
    *,
    rectangular: bool,
    window: int | None = None,
    documents: Documents | None = None,
) -> tuple[Tile, ...]:
    """Plan causal attention of a span of positions to all keys up to its end.

    Args:
        queries: positions of the queries.
        batch: sequences.
        rectangular: the kernel takes a causal block with more keys than rows, and a window, in one call; else such a
            block is cut into the keys before the rows and the rows' own square, and windows into strips.
        window: keys before its own position that a row sees; None: all.
        documents: a row sees the keys of its own document alone; None: one document a sequence.

    Raises:
        ValueError: no queries, a negative window, or documents of another batch or of other positions.
    """
    if queries.size < 1 or queries.begin < 0:
        raise ValueError(f"attention of positions {queries.begin} to {queries.end}: there is none")
    if window is not None and window < 0:
        raise ValueError(f"a sliding window of {window} keys before a query: give 0 or more, or None for all")
    groups = _groups(documents or Documents(((Run(0, queries.end, 0),),) * batch), queries, batch)
    cut = _whole if rectangular else _squares
    return tuple(
        Tile(sequences, Span(rows.begin - queries.begin, rows.end - queries.begin), blocks)
        for sequences, runs in groups
        for run in runs
        for rows, blocks in cut(run, window)
    )


def _groups(documents: Documents, queries: Span, batch: int) -> list[tuple[Span, tuple[Run, ...]]]:
    """Return neighbouring sequences with the same documents, and the runs of the queries in them."""
    if len(documents.runs) != batch:
        raise ValueError(f"documents of {len(documents.runs)} sequences for a batch of {batch}")
    runs = [documents.within(sequence, queries) for sequence in range(batch)]
    grouped = [list(group) for _, group in groupby(range(batch), key=runs.__getitem__)]
    return [(Span(group[0], group[-1] + 1), runs[group[0]]) for group in grouped]


def _seen(run: Run, window: int | None) -> tuple[int, int | None]:
    """Return the first key that a run sees, and the window if it cuts any of the run's rows."""
    first = run.start if window is None else max(run.start, run.begin - window)
    cuts = window is not None and run.end - 1 - window > first
    return first, window if cuts else None


def _whole(run: Run, window: int | None) -> Iterator[tuple[Span, tuple[Block, ...]]]:
    """One block for a run, for kernels that take it."""
    first, cut = _seen(run, window)
    yield Span(run.begin, run.end), (Block(Span(first, run.end), causal=True, window=cut),)


def _squares(run: Run, window: int | None) -> Iterator[tuple[Span, tuple[Block, ...]]]:
    """The run's own square and the keys before it; strips where a window cuts."""
    first, cut = _seen(run, window)
    if cut is None:
        own = Block(Span(run.begin, run.end), causal=True)
        before = (Block(Span(first, run.begin), causal=False),) if first < run.begin else ()
        yield Span(run.begin, run.end), (own, *before)
        return
    height = min(STRIP, max(64, cut // 2))
    for begin in range(run.begin, run.end, height):
        strip = Run(begin, min(begin + height, run.end), run.start)
        first, cut = _seen(strip, window)
        if cut is None:
            yield from _squares(strip, window)
        else:
            yield Span(strip.begin, strip.end), (Block(Span(first, strip.end), causal=True, window=cut),)
