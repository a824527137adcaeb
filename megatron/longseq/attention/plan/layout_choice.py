"""Choice of the layout of packed documents over a ring: a zigzag of the whole sequence, or one of each document.

Over documents the zigzag of a sequence no longer gives every rank as much work: a rank that holds the end of a long
document has more than one that holds short ones, and the others wait for it in each step of the ring. A zigzag of each
document shares the work evenly, but sends keys of all documents round the ring, where the other one sends those of
documents that lie on several ranks. The choice follows from documents and flags alone, so that all ranks make the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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
        is_unlike: whether the sequences of the micro-batch hold unlike documents, which have no common layout.
    """

    kind: LayoutKind
    pieces: Pieces | None
    sequence: LayoutCost | None = None
    document: LayoutCost | None = None
    is_unlike: bool = False

    @property
    def why(self) -> str:
        """One line for the log."""
        line = f"context-parallel layout of packed documents: by {self.kind}"
        if self.sequence is None:
            return f"{line} (no keys go round a ring)"
        shares = f"by sequence {self.sequence.imbalance:.2f}"
        if self.document is not None:
            shares += f", by document {self.document.imbalance:.2f}"
        elif self.kind == "sequence" and self.is_unlike:
            line += " (the sequences of a micro-batch hold unlike documents)"
        return f"{line}; work of the slowest rank over the mean: {shares}"


def document_pieces(documents: Documents, lengths: Sequence[int], size: int) -> Pieces | None:
    """Return the pieces of every segment, one for each document.

    Ends of documents are rounded up to multiples of 2C tokens of the segment, and documents that end at the same
    multiple share a piece. Attention is planned from positions, so a piece need not be one document.

    Args:
        documents: documents of a micro-batch.
        lengths: tokens of every segment.
        size: number of context-parallel ranks C.

    Returns:
        Pieces; None if the sequences of the batch hold unlike documents, or a segment is one piece anyway.
    """
    if _are_unlike(documents):
        return None
    step, ends = 2 * size, [span.end for span in documents.spans[0]]
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
) -> LayoutChoice:
    """Return the layout whose rings are faster; by sequence if both are alike.

    Sliding windows are not counted.

    Args:
        documents: documents of a micro-batch.
        types: communication of the layers, each of them once.
        lengths: tokens of every segment.
        kind: "sequence" or "document" takes that one; "auto" compares them.
        window: ranks of a window of a double ring; None: a plain ring.
    """
    size = types[0].mesh.size
    rings = [one for one in types if one.mesh.ring > 1]
    pieces = document_pieces(documents, lengths, size) if kind != "sequence" and size > 1 else None
    if not rings:
        return LayoutChoice("sequence", None)
    sequence = _cost(documents, rings, lengths, None, window)
    if pieces is None:
        return LayoutChoice("sequence", None, sequence, is_unlike=_are_unlike(documents))
    document = _cost(documents, rings, lengths, pieces, window)
    if kind == "document" or document.cost < sequence.cost:
        return LayoutChoice("document", pieces, sequence, document)
    return LayoutChoice("sequence", None, sequence, document)


def _are_unlike(documents: Documents) -> bool:
    return any(spans != documents.spans[0] for spans in documents.spans[1:])


def _cost(
    documents: Documents, types: Sequence[CommType], lengths: Sequence[int], pieces: Pieces | None, window: int | None
) -> LayoutCost:
    """Return the cost of a layout, over all segments and kinds of communication."""
    cost, slowest, mean = 0, 0, 0.0
    for one in types:
        layout = Layout(one.mesh, tuple(lengths), pieces=pieces)
        for segment in range(len(lengths)):
            scores, rows = _work(documents, layout, segment)
            if one.gathers:
                steps = [(scores.sum(1), rows.sum(1))]
            else:
                ring, ranks = Ring(one.mesh.ring, window or one.mesh.ring), range(one.mesh.ring)
                sources = [[ring.source(rank, step) for rank in ranks] for step in ranks]
                steps = [(scores[list(ranks), source], rows[list(ranks), source]) for source in sources]
            for of_rank, received in steps:
                most = int(np.maximum(of_rank, ROW_COST * received).max())
                cost += most + STEP_COST if most else 0
                slowest, mean = slowest + int(of_rank.max()), mean + float(of_rank.mean())
    return LayoutCost(cost, slowest / mean if mean else 1.0)


def _work(documents: Documents, layout: Layout, segment: int) -> tuple[_Numbers, _Numbers]:
    """Return (scores, rows of keys received) of a segment's queries of every ring index and the keys of every other."""
    ring = layout.mesh.ring
    held = [_Held(layout, index, segment + 1) for index in range(ring)]
    scores, rows = np.zeros((2, ring, ring), dtype=np.int64)
    for spans in documents.spans:
        known = np.array(spans, dtype=np.int64)
        for rank in range(ring):
            begin, end, start = _queries(known, layout, rank, segment)
            size = end - begin
            for source in range(ring):
                before = held[source].before
                scores[rank, source] += int((size * (before(begin) - before(start))).sum())
                if source != rank:
                    first = np.maximum(start, np.concatenate(([0], end[:-1])))  # not counted before
                    rows[rank, source] += int((before(end) - before(first)).sum())
            scores[rank, rank] += int((size * (size + 1) // 2).sum())
    return scores, rows


class _Held:
    """Keys of a ring index up to some segment."""

    def __init__(self, layout: Layout, ring: int, segments: int) -> None:
        ranges = np.array(layout.shard(ring, range(segments)), dtype=np.int64)
        self._begins, self._ends = ranges[:, 0], ranges[:, 1]
        self._rows = np.concatenate(([0], np.cumsum(self._ends - self._begins)))

    def before(self, bound: _Numbers) -> _Numbers:
        """Return how many keys lie before each bound."""
        index = np.searchsorted(self._begins, bound)
        last = np.maximum(index - 1, 0)
        inside = np.minimum(self._ends[last], bound) - self._begins[last]
        return np.where(index == 0, 0, self._rows[last] + inside)


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
