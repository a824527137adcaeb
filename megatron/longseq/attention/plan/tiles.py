"""Plan which blocks of the score matrix are computed, from token positions alone. Masked blocks are left out.

Under a causal mask, a sliding window and packed documents, a query sees one interval of positions. A buffer holds
positions in ascending order, perhaps with gaps, so this interval is a range of the buffer's rows. A tile is a range of
queries with the blocks of keys that they see; partial results of its blocks are merged by log-sum-exp.

The blocks of many documents are computed by few calls of a kernel, see `plan.launches`.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from megatron.longseq.attention.plan.launches import Block, Tile, Tiles
from megatron.longseq.attention.plan.ranges import (
    Documents,
    DocumentSpan,
    RowFinder,
    TokenRange,
    TokenRanges,
    intersection,
    rows_of,
    union,
)

# Rows of a windowed tile for kernels that need a mask for a window. It bounds the mask and its hidden part.
STRIP = 512


@dataclass(frozen=True, slots=True)
class Mask:
    """Causal mask of a micro-batch, optionally with a sliding window and packed documents.

    Attributes:
        batch: number of sequences.
        window: number of keys before its own position that a query sees; None: all.
        documents: positions of the documents; a query sees keys of its own document only. None: each sequence is one
            document.

    Raises:
        ValueError: The window is negative, or the documents are those of another batch size.
    """

    batch: int
    window: int | None = None
    documents: Documents | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 0:
            raise ValueError(f"sliding window of {self.window} keys: give 0 or more, or None for all keys")
        if self.documents is not None and len(self.documents.spans) != self.batch:
            raise ValueError(f"{len(self.documents.spans)} lists of documents for a batch of {self.batch}")

    def document_spans(self, queries: TokenRanges) -> list[tuple[TokenRange, tuple[DocumentSpan, ...]]]:
        """Return (sequences, document spans of the queries); neighbouring sequences with equal spans are grouped."""
        if self.documents is None:
            return [(TokenRange(0, self.batch), tuple(DocumentSpan(one.begin, one.end, 0) for one in queries))]
        spans = [
            tuple(span for one in queries for span in self.documents.within(sequence, one))
            for sequence in range(self.batch)
        ]
        grouped = [list(group) for _, group in groupby(range(self.batch), key=spans.__getitem__)]
        return [(TokenRange(group[0], group[-1] + 1), spans[group[0]]) for group in grouped]

    def first_visible(self, span: DocumentSpan) -> int:
        """Return the first position that the first query of a span sees."""
        return span.start if self.window is None else max(span.start, span.begin - self.window)

    def window_cuts(self, span: DocumentSpan) -> bool:
        """Return whether the window hides a key from some query of a span that the span's first query sees."""
        return self.window is not None and span.end - 1 - self.window > self.first_visible(span)


Plan = TypeVar("Plan")


def cached_plan(maxsize: int) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Return a decorator that caches a function of hashable arguments, one of which is a `Mask`.

    Every step has other documents, so in a cache of the process their plans would pile up. They are kept with the
    documents instead (`Documents.plans`), and freed with them.

    Args:
        maxsize: number of plans without documents that are kept.
    """

    def decorate(function: Callable[..., Plan]) -> Callable[..., Plan]:
        cached = functools.lru_cache(maxsize)(function)

        @functools.wraps(function)
        def plan(*args: Any, **options: Any) -> Plan:
            mask = next(one for one in args if isinstance(one, Mask))
            if mask.documents is None:
                return cached(*args, **options)
            hashable = tuple((mask.batch, mask.window) if one is mask else one for one in args)
            key: Hashable = (function.__qualname__, hashable, tuple(sorted(options.items())))
            plans = mask.documents.plans
            if key not in plans:
                plans[key] = function(*args, **options)
            return plans[key]  # type: ignore[no-any-return]

        return plan

    return decorate


class TilePlan(NamedTuple):
    """Tiles of one rank's queries over one buffer of keys.

    Attributes:
        first: tiles that hold the queries' own positions and cover every row once. Empty if the buffer holds the keys
            of another rank.
        more: tiles that are merged into existing results. Together with `first` they hold each visible score once.
    """

    first: Tiles
    more: Tiles


@cached_plan(maxsize=4096)
def visible_positions(queries: TokenRanges, mask: Mask) -> TokenRanges:
    """Return the positions that any of the queries sees, in any sequence.

    Args:
        queries: positions of the queries.
        mask: see `Mask`.
    """
    spans = (span for _, spans in mask.document_spans(queries) for span in spans)
    return union(TokenRange(mask.first_visible(span), span.end) for span in spans)


def visible_rows(queries: TokenRanges, keys: TokenRanges, mask: Mask) -> TokenRanges:
    """Return the rows of a buffer of keys that any of the queries sees, in any sequence.

    Args:
        queries: positions of the queries.
        keys: positions of the keys, in the order of the buffer's rows.
        mask: see `Mask`.
    """
    return rows_of(keys, intersection(keys, visible_positions(queries, mask)))


def plan_causal(queries: TokenRange, mask: Mask, *, rectangular: bool) -> Tiles:
    """Plan attention of consecutive queries to all keys up to their end.

    Args:
        queries: positions of the queries; rows of the tiles count from the first.
        mask: see `Mask`. Blocks name positions of keys.
        rectangular: see `plan_tiles`.

    Raises:
        ValueError: There are no queries, or the documents do not cover them.
    """
    if queries.size < 1 or queries.begin < 0:
        raise ValueError(f"there are no queries at positions {queries.begin} to {queries.end}")
    return plan_tiles((queries,), (TokenRange(0, queries.end),), mask, rectangular=rectangular).first


@cached_plan(maxsize=4096)
def plan_tiles(queries: TokenRanges, keys: TokenRanges, mask: Mask, *, rectangular: bool) -> TilePlan:
    """Plan attention of some queries to a buffer of keys.

    Args:
        queries: positions of the queries, in the order of their rows.
        keys: positions of the keys, in the order of their rows; blocks name rows.
        mask: see `Mask`.
        rectangular: the kernel takes a causal block with more keys than rows, and a window, in one call. Otherwise
            such a block is cut into the rows' own square and the keys before it, and windows into strips.

    Raises:
        ValueError: The buffer of keys holds only a part of a range of queries.
    """
    first: list[Tile] = []
    more: list[Tile] = []
    finder, row_of = RowFinder(keys), RowFinder(queries).before
    for batch, spans in mask.document_spans(queries):
        uncut: list[_Rows] = []
        for span in spans:
            row = row_of(span.begin)
            holds_own = _holds(finder, span)
            if mask.window is None or not mask.window_cuts(span):
                seen = TokenRange(finder.before(mask.first_visible(span)), finder.before(span.end))
                if seen.size:
                    uncut.append(_Rows(TokenRange(row, row + span.end - span.begin), seen, holds_own))
                continue
            for piece in finder.clip(mask.first_visible(span), span.end):
                is_own = holds_own and piece.end == span.end
                shift = finder.before(piece.begin) - piece.begin
                cut = _windowed_own if is_own else _windowed_earlier
                for rows, blocks in cut(span, piece, mask.window, rectangular):
                    moved = (Block(block.keys.shifted(shift), block.causal, block.window) for block in blocks)
                    (first if is_own else more).append(Tile(batch, rows.shifted(row - span.begin), tuple(moved)))
        for rows_ in _join_neighbours(uncut):
            (first if rows_.own else more).append(Tile(batch, rows_.rows, rows_.blocks(rectangular)))
    return TilePlan(Tiles(first), Tiles(more))


class _Rows(NamedTuple):
    """Rows of queries that no window cuts, and rows of their keys; `own`: the last keys are those of the rows."""

    rows: TokenRange
    keys: TokenRange
    own: bool

    def blocks(self, rectangular: bool) -> tuple[Block, ...]:
        """Return the blocks, that of the rows' own positions first."""
        if not self.own or rectangular or self.keys.size == self.rows.size:
            return (Block(self.keys, causal=self.own),)
        border = self.keys.end - self.rows.size
        own = Block(TokenRange(border, self.keys.end), causal=True)
        return own, Block(TokenRange(self.keys.begin, border), causal=False)


def _holds(keys: RowFinder, span: DocumentSpan) -> bool:
    """Return whether a buffer of keys holds the positions of a span.

    Raises:
        ValueError: It holds some of them only.
    """
    present = keys.before(span.end) - keys.before(span.begin)
    if present not in (0, span.end - span.begin):
        among = [tuple(one) for one in keys.clip(span.begin, span.end)]
        raise ValueError(
            f"queries have positions {span.begin} to {span.end}, but only {present} of these positions have keys "
            f"({among}); queries and keys must have the same layout"
        )
    return present > 0


def _join_neighbours(all_rows: Sequence[_Rows]) -> list[_Rows]:
    """Join neighbouring rows that see the same keys, or, with own keys, one more key each than the row before."""
    joined: list[_Rows] = []
    for one in all_rows:
        last = joined[-1] if joined else None
        if last and last.rows.end == one.rows.begin and last.own == one.own:
            grown = one.rows.size if one.own else 0
            if last.keys.begin == one.keys.begin and last.keys.end + grown == one.keys.end:
                joined[-1] = _Rows(TokenRange(last.rows.begin, one.rows.end), one.keys, one.own)
                continue
        joined.append(one)
    return joined


_Windowed = Iterator[tuple[TokenRange, tuple[Block, ...]]]  # positions of queries, and blocks in positions of keys


def _windowed_own(span: DocumentSpan, piece: TokenRange, window: int, rectangular: bool) -> _Windowed:
    """Cut the queries of a span against the piece of keys that holds their own positions."""
    mask, near = Mask(1, window), DocumentSpan(span.begin, span.end, max(span.start, piece.begin))
    for strip in _strips(near, window, rectangular) if mask.window_cuts(near) else (near,):
        first, rows = mask.first_visible(strip), TokenRange(strip.begin, strip.end)
        if mask.window_cuts(strip):
            yield rows, (Block(TokenRange(first, strip.end), causal=True, window=window),)
        else:
            yield rows, _Rows(rows, TokenRange(first, strip.end), own=True).blocks(rectangular)


def _windowed_earlier(span: DocumentSpan, piece: TokenRange, window: int, rectangular: bool) -> _Windowed:
    """Cut the queries of a span against a piece of keys before them."""
    for strip in _strips(span, window, rectangular):
        rows = TokenRange(strip.begin, min(strip.end, piece.end + window))
        keys = TokenRange(max(piece.begin, strip.begin - window), piece.end)
        if rows.size > 0 and keys.size > 0:
            is_cut = rows.end - 1 - window > keys.begin
            if is_cut and rows.size > keys.size + 1:  # flash kernels would also hide keys on the right of such a block
                border = keys.begin + window + 1  # rows before it see all of the keys
                yield TokenRange(rows.begin, border), (Block(keys, causal=False),)
                rows, keys = TokenRange(border, rows.end), TokenRange(border - window, keys.end)
            # A kernel aligns its window at the last row and the last key, whose positions are this far apart.
            yield rows, (Block(keys, causal=False, window=window - (rows.end - keys.end) if is_cut else None),)


def _strips(span: DocumentSpan, window: int, rectangular: bool) -> Iterator[DocumentSpan]:
    """Yield a span in strips whose height bounds the mask, for kernels that need a mask for a window."""
    height = span.end - span.begin if rectangular else min(STRIP, max(64, window // 2))
    for begin in range(span.begin, span.end, height):
        yield DocumentSpan(begin, min(begin + height, span.end), span.start)
