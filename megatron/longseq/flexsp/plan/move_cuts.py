"""Cuts between the micro-batches of sorted sequences, moved as long as quick plans become faster.

The blaster balances tokens (`split`). Which cuts are the fastest depends on how the sequences on either side fit into
groups, which no estimate predicts well; so this search plans both sides of every cut that it tries.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron.longseq.flexsp.plan.assign import WorkGroup, makespan
from megatron.longseq.flexsp.plan.microbatch import QUICK, plan_microbatch
from megatron.longseq.flexsp.plan.problem import StepProblem
from megatron.longseq.flexsp.plan.split import Parts

_SHARES = (0.3, 0.15, 0.07, 0.03, 0.0)  # of the smaller neighbour's sequences that a cut moves by, but at least one
_LEAST_GAIN = 1e-6

Cuts = tuple[int, ...]  # number of sequences before the end of every micro-batch


class QuickPlans:
    """Quick plans of contiguous parts of the sorted sequences, each made once.

    Args:
        problem: the step.
    """

    def __init__(self, problem: StepProblem) -> None:
        self.problem = problem
        self.tried: dict[Cuts, float] = {}
        self._memory = problem.ranks * problem.cost.tokens_per_rank
        self._before = [0, *accumulate(problem.least_tokens[index] for index in problem.order)]
        self._known: dict[tuple[int, int], list[WorkGroup] | None] = {}

    @property
    def count(self) -> int:
        """Number of sequences in all parts that were planned."""
        return sum(end - begin for begin, end in self._known)

    def groups(self, begin: int, end: int) -> list[WorkGroup] | None:
        """Return the groups of a part; None where it does not fit into a micro-batch.

        Args:
            begin, end: half-open range of places in `StepProblem.order`.
        """
        if (begin, end) not in self._known:
            fits = 0 < self._before[end] - self._before[begin] <= self._memory
            part = self.problem.order[begin:end]
            self._known[begin, end] = plan_microbatch(self.problem, part, QUICK) if fits else None
        return self._known[begin, end]

    def plan(self, cuts: Cuts) -> list[list[WorkGroup]] | None:
        """Return copies of the groups of every micro-batch; None where one of them does not fit."""
        found = []
        for begin, end in pairwise((0, *cuts)):
            groups = self.groups(begin, end)
            if groups is None:
                return None
            found.append([group.copy() for group in groups])
        return found

    def parts(self, cuts: Cuts) -> Parts:
        """Return the sequences of every micro-batch, longest first."""
        return tuple(self.problem.order[begin:end] for begin, end in pairwise((0, *cuts)))

    def seconds(self, cuts: Cuts) -> float:
        """Return the seconds of all micro-batches; infinite where one does not fit."""
        if cuts not in self.tried:
            self.tried[cuts] = sum(self._part_seconds(begin, end) for begin, end in pairwise((0, *cuts)))
        return self.tried[cuts]

    def _part_seconds(self, begin: int, end: int) -> float:
        groups = self.groups(begin, end)
        return float("inf") if groups is None else makespan(groups)


def cuts_of(parts: Parts) -> Cuts:
    """Return the cuts of contiguous micro-batches."""
    return tuple(accumulate(len(part) for part in parts))


def move_cuts(plans: QuickPlans, start: Cuts, most: int) -> Cuts:
    """Return cuts as good as `start` or better, into as many micro-batches.

    Args:
        plans: quick plans; those of all cuts that are tried stay in it.
        start: cuts to begin with.
        most: sequences that may be planned.
    """
    current, end = start, plans.count + most
    for share in _SHARES:
        better: Cuts | None = current
        while better is not None:
            current = better
            better = next(
                (
                    cuts
                    for cuts in _neighbours(current, share)
                    if plans.count < end and plans.seconds(cuts) < plans.seconds(current) * (1 - _LEAST_GAIN)
                ),
                None,
            )
    return current


def _neighbours(cuts: Cuts, share: float) -> Sequence[Cuts]:
    """Return the cuts with one of them moved."""
    found = []
    for number, (begin, at, end) in enumerate(zip((0, *cuts), cuts, cuts[1:], strict=False)):
        for step in (-1, 1):
            to = at + step * max(1, round(share * min(at - begin, end - at)))
            if begin < to < end:
                found.append((*cuts[:number], to, *cuts[number + 1 :]))
    return found
