"""Which blocks of one rank's keys another rank's queries see, from their positions alone; nothing masked is computed.

A rank's buffer holds positions in ascending order, in several pieces. What a row sees under a causal mask, a sliding
window and packed documents is an interval of positions, so it is a range of rows of any such buffer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from megatron.longseq.attention.plan.ranges import Spans, before, clipped, common, located, union
from megatron.longseq.attention.plan.tiles import STRIP, Block, Documents, Run, Span, Tile, plan_causal


@dataclass(frozen=True, slots=True)
class Mask:
    """What a causal mask is restricted to.

    Attributes:
        batch: sequences.
        window: keys before its own position that a row sees; None: all.
        documents: of the batch, in global positions; a row sees the keys of its own alone; None: one a sequence.

    Raises:
        ValueError: a negative window, or documents of another batch.
    """

    batch: int
    window: int | None = None
    documents: Documents | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 0:
            raise ValueError(f"a sliding window of {self.window} keys before a query: give 0 or more, or None for all")
        if self.documents is not None and len(self.documents.runs) != self.batch:
            raise ValueError(f"documents of {len(self.documents.runs)} sequences for a batch of {self.batch}")

    def runs(self, queries: Spans) -> list[tuple[Span, tuple[Run, ...]]]:
        """Return neighbouring sequences that are alike, with the queries' runs of positions inside a document."""
        if self.documents is None:
            return [(Span(0, self.batch), tuple(Run(span.begin, span.end, 0) for span in queries))]
        runs = [
            tuple(run for span in queries for run in self.documents.within(sequence, span))
            for sequence in range(self.batch)
        ]
        grouped = [list(group) for _, group in groupby(range(self.batch), key=runs.__getitem__)]
        return [(Span(group[0], group[-1] + 1), runs[group[0]]) for group in grouped]

    def first(self, run: Run) -> int:
        """Return the first position that the first row of a run sees."""
        return run.start if self.window is None else max(run.start, run.begin - self.window)

    def cuts(self, run: Run) -> bool:
        """Return whether the window hides from some row of a run what the first row sees."""
        return self.window is not None and run.end - 1 - self.window > self.first(run)


class Cover(NamedTuple):
    """Blocks of some queries and the keys of one rank.

    Attributes:
        begun: hold the queries' own positions: they cover every row once. Empty unless the keys are the rank's own.
        added: to be merged into rows that have begun; together with `begun` they have each visible score once.
    """

    begun: tuple[Tile, ...]
    added: tuple[Tile, ...]


@lru_cache(maxsize=4096)
def visible(queries: Spans, mask: Mask) -> Spans:
    """Return the positions that any row of some queries sees, in any sequence."""
    return union(Span(mask.first(run), run.end) for _, runs in mask.runs(queries) for run in runs)


def needed(queries: Spans, keys: Spans, mask: Mask) -> Spans:
    """Return the rows of a buffer of keys that any query sees, in any sequence."""
    return located(keys, common(keys, visible(queries, mask)))


@lru_cache(maxsize=4096)
def plan_shard(queries: Spans, keys: Spans, mask: Mask, *, rectangular: bool) -> Cover:
    """Plan the blocks of some queries and a buffer of keys.

    Args:
        queries: positions of the queries, in the order of their rows.
        keys: positions of the keys, in the order of their rows; the tiles' blocks name rows.
        mask: what is seen.
        rectangular: see `blocks.plan_causal`.

    Raises:
        ValueError: keys that hold part of a run of queries.
    """
    begun: list[Tile] = []
    added: list[Tile] = []
    for batch, runs in mask.runs(queries):
        plain: list[_Plain] = []
        for run in runs:
            row = before(queries, run.begin)
            if mask.window is None or not mask.cuts(run):
                plain += _whole(run, row, keys, mask.first(run))
                continue
            own = _holds(keys, run)
            for piece in clipped(keys, mask.first(run), run.end):
                here = own and piece.end == run.end
                shift = before(keys, piece.begin) - piece.begin
                for rows, blocks in (_own_piece if here else _earlier_piece)(run, piece, mask.window, rectangular):
                    moved = (Block(block.keys.moved(shift), block.causal, block.window) for block in blocks)
                    (begun if here else added).append(Tile(batch, rows.moved(row - run.begin), tuple(moved)))
        for block in _joined(plain):
            (begun if block.own else added).append(Tile(batch, block.rows, block.blocks(rectangular)))
    return Cover(tuple(begun), tuple(added))


class _Plain(NamedTuple):
    """Rows that no window cuts, and their keys; `own`: the last keys are the rows' own positions."""

    rows: Span
    keys: Span
    own: bool

    def blocks(self, rectangular: bool) -> tuple[Block, ...]:
        """Return its blocks: the rows' own square first."""
        if not self.own or rectangular or self.keys.size == self.rows.size:
            return (Block(self.keys, causal=self.own),)
        border = self.keys.end - self.rows.size
        square = Block(Span(border, self.keys.end), causal=True)
        return square, Block(Span(self.keys.begin, border), causal=False)


def _holds(keys: Spans, run: Run) -> bool:
    """Return whether a buffer holds a run's own positions.

    Raises:
        ValueError: it holds part of them.
    """
    held = before(keys, run.end) - before(keys, run.begin)
    if held not in (0, run.end - run.begin):
        raise ValueError(
            f"queries of positions {run.begin} to {run.end}, but {held} of them among the keys of positions "
            f"{[tuple(span) for span in keys]}: queries and keys must be of one layout"
        )
    return held > 0


def _whole(run: Run, row: int, keys: Spans, first: int) -> Iterator[_Plain]:
    """The keys of a run that no window cuts."""
    own = _holds(keys, run)
    seen = Span(before(keys, first), before(keys, run.end))
    if seen.size:
        yield _Plain(Span(row, row + run.end - run.begin), seen, own)


def _joined(blocks: Sequence[_Plain]) -> list[_Plain]:
    """Join neighbouring rows that see the same keys, or, each a key more than the one before, their own."""
    joined: list[_Plain] = []
    for block in blocks:
        last = joined[-1] if joined else None
        if last and last.rows.end == block.rows.begin and last.own == block.own:
            grown = block.rows.size if block.own else 0
            if last.keys.begin == block.keys.begin and last.keys.end + grown == block.keys.end:
                joined[-1] = _Plain(Span(last.rows.begin, block.rows.end), block.keys, block.own)
                continue
        joined.append(block)
    return joined


_Windowed = Iterator[tuple[Span, tuple[Block, ...]]]


def _own_piece(run: Run, piece: Span, window: int, rectangular: bool) -> _Windowed:
    """Positions of a run's rows and of the keys around them, which the buffer holds without gaps."""
    alone = Documents(((Run(run.begin, run.end, max(run.start, piece.begin)),),))
    span = Span(run.begin, run.end)
    for tile in plan_causal(span, 1, rectangular=rectangular, window=window, documents=alone):
        yield tile.rows.moved(run.begin), tile.blocks


def _earlier_piece(run: Run, piece: Span, window: int, rectangular: bool) -> _Windowed:
    """Positions of a run's rows that see keys of an earlier piece, and the blocks of them."""
    for strip in _strips(run, window, rectangular):
        rows = Span(strip.begin, min(strip.end, piece.end + window))
        keys = Span(max(piece.begin, strip.begin - window), piece.end)
        if rows.size > 0 and keys.size > 0:
            cut = rows.end - 1 - window > keys.begin
            if cut and rows.size > keys.size + 1:  # flash on a GPU would cut such a block on the right, too
                border = keys.begin + window + 1  # rows before it see all of the keys
                yield Span(rows.begin, border), (Block(keys, causal=False),)
                rows, keys = Span(border, rows.end), Span(border - window, keys.end)
            # The kernel's window is aligned at the last row and the last key; their positions are this far apart.
            yield rows, (Block(keys, causal=False, window=window - (rows.end - keys.end) if cut else None),)


def _strips(run: Run, window: int, rectangular: bool) -> Iterator[Run]:
    """Rows of a run in strips, where the kernel needs a mask for a window: they bound it."""
    height = run.end - run.begin if rectangular else min(STRIP, max(64, window // 2))
    for begin in range(run.begin, run.end, height):
        yield Run(begin, min(begin + height, run.end), run.start)
