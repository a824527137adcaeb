"""Choice of the layout of packed documents over a ring: a zigzag of the whole sequence, or one of each document.

Over documents the zigzag of a sequence no longer gives every rank as much work: a rank that holds the end of a long
document has more than one that holds short ones, and the others wait for it in each step of the ring. A zigzag of each
document shares the work evenly, but sends keys of all documents round the ring, where the other one sends those of
documents that lie on several ranks. The choice follows from documents and flags alone, so that all ranks make the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.attention.plan.comm_type import CommType
from megatron.longseq.attention.plan.layout import Layout, Pieces
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.plan.ring_schedule import Ring

LayoutKind = Literal["auto", "sequence", "document"]

# In scores that a rank computes in as much time: of 32 heads of 128 on a GPU at half its speed, with links of 200 GB/s.
ROW_COST = 512  # receiving a row of keys and values, and returning its gradients
STEP_COST = 1 << 17  # launches and messages of a step

_Numbers = NDArray[np.int64]


class LayoutCost(NamedTuple):
    """Work of attention over a ring.

    Attributes:
        cost: slowest rank of every step, in scores.
        imbalance: scores of the slowest rank over the mean, weighed over the steps; 1.0 is an even share.
    """

    cost: int
    imbalance: float


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """A chosen layout and its reason.

    Attributes:
        kind: "sequence" or "document".
        pieces: see `Layout`; None: by sequence.
        sequence, document: costs of the two; None: there is no ring, or the other layout was not looked at.
    """

    kind: LayoutKind
    pieces: Pieces | None
    sequence: LayoutCost | None = None
    document: LayoutCost | None = None

    @property
    def why(self) -> str:
        """One line for the log."""
        line = f"context-parallel layout of packed documents: by {self.kind}"
        if self.sequence is None:
            return f"{line} (no keys go round a ring)"
        shares = f"by sequence {self.sequence.imbalance:.2f}"
        if self.document is not None:
            shares += f", by document {self.document.imbalance:.2f}"
        return f"{line}; work of the slowest rank over the mean: {shares}"


def document_pieces(documents: Documents, lengths: Sequence[int], size: int) -> Pieces | None:
    """Return the pieces of every segment, one for each document.

    Ends of documents are rounded up to multiples of 2C tokens of the segment, and documents that end at the same
    multiple share a piece. The sequences of a micro-batch have the same pieces: if they hold unlike documents, a piece
    ends wherever a document of any of them does, and a long document of one sequence lies in several pieces. Each piece
    is shared evenly, and attention is planned from positions, so a piece need not be one document.

    Args:
        documents: documents of a micro-batch.
        lengths: tokens of every segment.
        size: number of context-parallel ranks C.

    Returns:
        Pieces; None if every segment is one piece anyway.
    """
    step, ends = 2 * size, {span.end for spans in documents.spans for span in spans}
    pieces = []
    for begin, end in pairwise(accumulate(lengths, initial=0)):
        borders = {-(-(one - begin) // step) * step for one in ends if begin < one < end}
        pieces.append(tuple(b - a for a, b in pairwise(sorted({0, end - begin, *borders}))))
    return None if all(len(one) == 1 for one in pieces) else tuple(pieces)


def choose_layout(
    documents: Documents,
    types: Sequence[CommType],
    lengths: Sequence[int],
    *,
    kind: LayoutKind = "auto",
    window: int | None = None,
    sliding: Mapping[int | None, int] | None = None,
) -> LayoutChoice:
    """Return the layout whose rings are faster; by sequence if both are alike.

    Args:
        documents: documents of a micro-batch.
        types: communication of the layers, each of them once.
        lengths: tokens of every segment.
        kind: "sequence" or "document" takes that one; "auto" compares them.
        window: ranks of a window of a double ring; None: a plain ring.
        sliding: number of layers with each sliding window: the keys before its own that a query sees, or None for all.
    """
    size = types[0].mesh.size
    rings = [one for one in types if one.mesh.ring > 1]
    pieces = document_pieces(documents, lengths, size) if kind != "sequence" and size > 1 else None
    if not rings:
        return LayoutChoice("sequence", None)
    layers = sliding or {None: 1}
    sequence = _cost(documents, rings, lengths, None, window, layers)
    if pieces is None:
        return LayoutChoice("sequence", None, sequence)
    document = _cost(documents, rings, lengths, pieces, window, layers)
    if kind == "document" or document.cost < sequence.cost:
        return LayoutChoice("document", pieces, sequence, document)
    return LayoutChoice("sequence", None, sequence, document)


def _cost(
    documents: Documents,
    types: Sequence[CommType],
    lengths: Sequence[int],
    pieces: Pieces | None,
    window: int | None,
    sliding: Mapping[int | None, int],
) -> LayoutCost:
    """Return the cost of a layout, over all segments, kinds of communication and layers."""
    cost, slowest, mean = 0, 0, 0.0
    for one, (reach, layers) in product(types, sliding.items()):
        layout = Layout(one.mesh, tuple(lengths), pieces=pieces)
        for segment in range(len(lengths)):
            scores, rows = _work(documents, layout, segment, reach)
            if one.gathers:
                steps = [(scores.sum(1), rows.sum(1))]
            else:
                ring, ranks = Ring(one.mesh.ring, window or one.mesh.ring), range(one.mesh.ring)
                sources = [[ring.source(rank, step) for rank in ranks] for step in ranks]
                steps = [(scores[list(ranks), source], rows[list(ranks), source]) for source in sources]
            for of_rank, received in steps:
                most = int(np.maximum(of_rank, ROW_COST * received).max())
                cost += layers * (most + STEP_COST) if most else 0
                slowest, mean = slowest + layers * int(of_rank.max()), mean + layers * float(of_rank.mean())
    return LayoutCost(cost, slowest / mean if mean else 1.0)


def _work(documents: Documents, layout: Layout, segment: int, reach: int | None) -> tuple[_Numbers, _Numbers]:
    """Return (scores, rows of keys received) of a segment's queries of every ring index and the keys of every other.

    Args:
        documents: documents of a micro-batch.
        layout: positions of the tokens.
        segment: index of the segment.
        reach: keys before its own that a query sees (a sliding window); None: all of its document.
    """
    ring = layout.mesh.ring
    sources = [_Held(layout, index, segment + 1) for index in range(ring)]
    scores, rows = np.zeros((2, ring, ring), dtype=np.int64)
    for spans in documents.spans:
        known = np.array(spans, dtype=np.int64)
        for rank in range(ring):
            begin, end, start = _queries(known, layout, rank, segment)
            size = end - begin
            for source in range(ring):
                scores[rank, source] += int(sources[source].seen_before(begin, end, start, reach).sum())
                if source != rank:
                    before = sources[source].before
                    seen = start if reach is None else np.maximum(start, begin - reach)
                    first = np.maximum(seen, np.concatenate(([0], end[:-1])))  # not counted before
                    rows[rank, source] += int((before(end) - before(first)).sum())
            width = size if reach is None else np.minimum(size, reach + 1)
            scores[rank, rank] += int((width * (width + 1) // 2 + (size - width) * width).sum())
    return scores, rows


class _Held:
    """Keys of a ring index up to some segment."""

    def __init__(self, layout: Layout, ring: int, segments: int) -> None:
        ranges = np.array(layout.shard(ring, range(segments)), dtype=np.int64)
        self._begins, self._ends = ranges[:, 0], ranges[:, 1]
        sizes = self._ends - self._begins
        self._rows = np.concatenate(([0], np.cumsum(sizes)))
        self._sums = np.concatenate(([0], np.cumsum(sizes * (self._begins + self._ends - 1) // 2)))

    def before(self, bound: _Numbers) -> _Numbers:
        """Return how many keys lie before each bound."""
        index = np.searchsorted(self._begins, bound)
        last = np.maximum(index - 1, 0)
        inside = np.minimum(self._ends[last], bound) - self._begins[last]
        return np.where(index == 0, 0, self._rows[last] + inside)

    def seen_before(self, begin: _Numbers, end: _Numbers, start: _Numbers, reach: int | None) -> _Numbers:
        """Return how many (query, key) pairs the queries begin .. end - 1 see of the keys before `begin`.

        A query q sees the keys from `start`, or q - `reach` if that is later, on.
        """
        if reach is None:
            return (end - begin) * (self.before(begin) - self.before(start))
        first, last = np.clip(start + reach, begin, end), np.clip(begin + reach, begin, end)
        first = np.minimum(first, last)
        hidden = (first - begin) * self.before(start) + (end - last) * self.before(begin)
        hidden += self._summed(last - reach) - self._summed(first - reach)
        return (end - begin) * self.before(begin) - hidden

    def _summed(self, bound: _Numbers) -> _Numbers:
        """Return the sum of `before(n)` over n = 0 .. bound - 1: a key k counts in bound - 1 - k of them."""
        bound = np.maximum(bound, 0)
        index = np.searchsorted(self._begins, bound)
        last = np.maximum(index - 1, 0)
        begins, ends = self._begins[last], np.minimum(self._ends[last], bound)
        sums = np.where(index == 0, 0, self._sums[last] + (ends - begins) * (begins + ends - 1) // 2)
        return np.where(bound == 0, 0, (bound - 1) * self.before(bound) - sums)


def _queries(spans: _Numbers, layout: Layout, ring: int, segment: int) -> tuple[_Numbers, _Numbers, _Numbers]:
    """Return (begin, end, start of the document) of a ring index's queries, cut where documents end."""
    ranges = np.array(layout.ring_positions(ring, segment), dtype=np.int64)
    edges = np.unique(np.concatenate((ranges.ravel(), spans[:, 0])))
    begin, end = edges[:-1], edges[1:]
    within = np.searchsorted(ranges[:, 0], begin, side="right") - 1
    is_held = (within >= 0) & (begin < ranges[np.maximum(within, 0), 1])
    begin, end = begin[is_held], end[is_held]
    start = spans[np.searchsorted(spans[:, 0], begin, side="right") - 1, 2]
    return begin, end, start
