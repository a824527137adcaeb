"""Groups for the sequences of one micro-batch: their degrees and their sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.longseq.flexsp.plan.assign import WorkGroup, assign, best_fit, makespan
from megatron.longseq.flexsp.plan.degree_sets import candidates, exchanges, lower_estimate, neighbours
from megatron.longseq.flexsp.plan.local_search import improve
from megatron.longseq.flexsp.plan.placement import DegreeCounts
from megatron.longseq.flexsp.plan.problem import StepProblem

_CLOSE = 1.004  # of the lower estimate: no further search
_BISECTIONS = 7
_FAR = 1.15  # of the fastest groups so far: others that are slower than that are not searched


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a micro-batch is searched for. All of them are counts, so that plans do not depend on the machine.

    Attributes:
        placements: sequences that are placed in a group, over all sets of degrees that are tried.
        least: sets of degrees that are tried in any case.
        moves: moves and swaps of each local search.
        refined: sets of degrees, the best ones, that are searched locally.
        fine: sequences times groups up to which sets of degrees are also tried by `best_fit`.
    """

    placements: int
    least: int
    moves: int
    refined: int
    fine: int


QUICK = Effort(placements=3_000, least=12, moves=20, refined=1, fine=3_000)
THOROUGH = Effort(placements=30_000, least=12, moves=200, refined=2, fine=30_000)
FINAL = Effort(placements=60_000, least=16, moves=200, refined=3, fine=30_000)


class _Search:
    """Sets of degrees that were tried for a micro-batch."""

    def __init__(self, problem: StepProblem, indices: Sequence[int], effort: Effort) -> None:
        self.problem, self.indices, self.effort = problem, indices, effort
        self.estimate = lower_estimate(problem, indices)
        self.tried: dict[DegreeCounts, tuple[float, list[WorkGroup] | None]] = {}
        self.placed = 0
        self._best: DegreeCounts | None = None
        held = np.array(indices)
        self._work = {degree: work[held] for degree, work in problem.least_work.items()}

    @property
    def is_over(self) -> bool:
        return self.placed >= self.effort.placements and len(self.tried) >= self.effort.least

    def best(self) -> DegreeCounts | None:
        """Return the fastest set of degrees so far; of equally fast ones the first."""
        return self._best

    def seconds(self, counts: DegreeCounts) -> float:
        """Return the seconds of the micro-batch with groups of these degrees; infinite if the sequences do not fit."""
        if counts not in self.tried:
            seconds, groups = self.tried[counts] = self._try(counts)
            if groups is not None and (self._best is None or seconds < self.tried[self._best][0]):
                self._best = counts
        return self.tried[counts][0]

    def _least_seconds(self, counts: DegreeCounts) -> float:
        """Return seconds that no groups of these degrees are below: an even share of the least work."""
        work = np.min([self._work[degree] for degree, _ in counts], axis=0).sum()
        return self.problem.startup + float(work) / sum(degree * count for degree, count in counts)

    def _try(self, counts: DegreeCounts) -> tuple[float, list[WorkGroup] | None]:
        problem, indices, best = self.problem, self.indices, self.best()
        known = self.tried[best][0] if best is not None else float("inf")
        if self._least_seconds(counts) >= known:
            return float("inf"), None
        self.placed += len(indices)
        fine = len(indices) * sum(count for _, count in counts) <= self.effort.fine
        groups = assign(problem, indices, counts, float("inf") if fine else known)
        seconds = float("inf") if groups is None else makespan(groups)
        if not fine or seconds <= self.estimate * _CLOSE or (groups is not None and seconds > _FAR * known):
            return seconds, groups
        for by_memory in (True, False):
            low = self.estimate
            high = min(seconds, 1.05 * known) if min(seconds, known) < float("inf") else 8 * self.estimate
            for step in range(_BISECTIONS):
                target = high * (1 - 1e-6) if step == 0 else (low + high) / 2
                packed = best_fit(problem, indices, counts, target, by_memory)
                self.placed += len(indices)
                if packed is None:
                    if step == 0:
                        break
                    low = target
                elif makespan(packed) < seconds:
                    seconds, groups = makespan(packed), packed
                    high = seconds
                if high - low < 0.003 * high:
                    break
        return seconds, groups


def plan_microbatch(problem: StepProblem, indices: Sequence[int], effort: Effort) -> list[WorkGroup] | None:
    """Return groups with all of the sequences, or None where they were not found to fit into one micro-batch.

    Args:
        problem: the step.
        indices: sequences, longest first; at least one.
        effort: how long to search.
    """
    search = _Search(problem, indices, effort)
    for counts in candidates(problem, indices, search.estimate):
        search.seconds(counts)
    changes = exchanges(problem)
    current = search.best()
    if current is None:  # scarce memory: any neighbour of a candidate that does
        for start in list(search.tried):
            for counts in neighbours(problem, start, changes):
                if search.seconds(counts) < float("inf") or search.is_over:
                    break
            current = search.best()
            if current is not None or search.is_over:
                break
    if current is None:
        return None
    while search.seconds(current) > search.estimate * _CLOSE:
        better = None
        for counts in neighbours(problem, current, changes):
            if search.is_over:
                break
            if search.seconds(counts) < search.seconds(current) * (1 - 1e-4):
                better = counts
                break
        if better is None:
            break
        current = better
    return _refined(search)


def _refined(search: _Search) -> list[WorkGroup]:
    """Return the best groups after a local search in each of the best sets of degrees."""
    ranked = sorted((seconds, counts) for counts, (seconds, groups) in search.tried.items() if groups is not None)
    best: list[WorkGroup] = []
    for _, counts in ranked[: search.effort.refined]:
        groups = search.tried[counts][1] or []
        if makespan(groups) > search.estimate * (1 + 1e-9):
            improve(search.problem, groups, search.effort.moves)
        if not best or makespan(groups) < makespan(best):
            best = groups
    return best
