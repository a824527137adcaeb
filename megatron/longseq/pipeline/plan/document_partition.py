"""Cut the sequences of a packed micro-batch into segments in which its documents have equal work.

A token sees the tokens of its own document alone, so the work of a segment depends on where documents begin: lengths
that balance a causal triangle leave segments of short documents idle while another one computes a long document. The
cut follows from documents and flags alone, so that all ranks and stages derive the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.pipeline.plan.partition import TILE, TOLERATED, check_length, unit_costs
from megatron.longseq.pipeline.plan.segment_cost import CostModel

_Numbers = NDArray[np.int64]
_Costs = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DocumentCut:
    """The segments of one micro-batch.

    Attributes:
        kind: "documents": cut by the work of the documents; "sequence": as a sequence without documents.
        lengths: tokens per segment, in order.
        sequence, documents: cost of the slowest segment over the mean with either cut, forward plus backward.
    """

    kind: Literal["documents", "sequence"]
    lengths: tuple[int, ...]
    sequence: float
    documents: float


def cut_by_documents(
    model: CostModel, by_sequence: Sequence[int], documents: Documents, *, multiple: int = 1
) -> DocumentCut:
    """Return the segments of a micro-batch, whose sequences are all cut at the same positions.

    The cut by documents is taken if its slowest segment costs over 1% less than that of the other one.

    Args:
        model: costs of a token and of a cell.
        by_sequence: tokens per segment of a sequence without documents.
        documents: documents of the micro-batch.
        multiple: every length must be a multiple of it, see `layout.length_multiple`.

    Raises:
        ValueError: the sequence is too short or not a multiple of `multiple`.
    """
    total, segments = sum(by_sequence), len(by_sequence)
    check_length(total, segments, multiple)
    work = _CumulativeWork(model, documents)
    known = _imbalance(work(np.cumsum([0, *by_sequence])))
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for align in dict.fromkeys(math.lcm(multiple, TILE >> i) for i in range(TILE.bit_length())):
        if total // align < segments:
            continue
        positions = np.append(np.arange(0, total, align), total)
        costs = work(positions)
        cuts = _cuts(costs, segments)
        imbalance = _imbalance(costs[cuts])
        if imbalance < best[0]:
            best = imbalance, tuple(int(b - a) for a, b in pairwise(positions[cuts]))
        if best[0] <= TOLERATED:
            break
    imbalance, lengths = best
    if imbalance * TOLERATED < known:
        return DocumentCut("documents", lengths, known, imbalance)
    return DocumentCut("sequence", tuple(by_sequence), known, imbalance)


def describe_cuts(cuts: Sequence[DocumentCut]) -> str:
    """Return one line for the log about the micro-batches of a step."""
    count = sum(cut.kind == "documents" for cut in cuts)
    sequence, documents = (
        sum(values) / len(cuts) for values in zip(*((c.sequence, c.documents) for c in cuts), strict=True)
    )
    return (
        f"segments of packed documents: {count} of {len(cuts)} micro-batches cut by documents, {len(cuts) - count} by "
        f"sequence; work of the slowest segment over the mean: by sequence {sequence:.2f}, by documents {documents:.2f}"
    )


class _CumulativeWork:
    """Cost of the first tokens of all sequences of a micro-batch, forward plus backward, over all layers.

    The cost per call is the same for every segment and moves no cut.
    """

    def __init__(self, model: CostModel, documents: Documents) -> None:
        self._cell, self._token = unit_costs(model)
        self._windows = model.shape.windows()
        self._sequences = [np.array(spans, dtype=np.int64) for spans in documents.spans]

    def __call__(self, positions: _Numbers) -> _Costs:
        """Return the cost of the tokens before each position."""
        costs = self._token * len(self._sequences) * positions.astype(np.float64)
        for spans in self._sequences:
            for window, layers in self._windows.items():
                costs += self._cell * layers * _cells_before(spans, positions, window)
        return costs


def _cells_before(spans: _Numbers, positions: _Numbers, window: int | None) -> _Numbers:
    """Return how many (query, key) pairs are visible to the queries before each position of a sequence."""
    begin, end, start = spans.T
    first = _visible(begin - start, window)
    before = np.concatenate(([0], np.cumsum(_visible(end - start, window) - first)))
    index = np.maximum(np.searchsorted(begin, positions, side="right") - 1, 0)
    return before[index] + _visible(np.minimum(positions, end[index]) - start[index], window) - first[index]


def _visible(tokens: _Numbers, window: int | None) -> _Numbers:
    """Return the visible pairs of the first tokens of a document."""
    width = tokens if window is None else np.minimum(tokens, window + 1)
    return width * (width + 1) // 2 + (tokens - width) * width


def _cuts(costs: _Costs, segments: int) -> list[int]:
    """Return the indices of the cuts, with both ends: those whose cost is nearest to i/K of the total."""
    last, cuts = len(costs) - 1, [0]
    for number in range(1, segments):
        target = costs[-1] * number / segments
        index = int(np.searchsorted(costs, target))
        if index > 0 and target - costs[index - 1] <= costs[index] - target:
            index -= 1
        cuts.append(min(max(index, cuts[-1] + 1), last - (segments - number)))
    return [*cuts, last]


def _imbalance(costs: _Costs) -> float:
    each = np.diff(costs)
    return float(each.max() / each.mean())
