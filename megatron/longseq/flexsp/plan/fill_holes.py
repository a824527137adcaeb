"""Hole filling: sequences of one micro-batch move into idle time and free memory of the groups of others.

Contiguous micro-batches leave holes: groups that end before the slowest one, or that have free memory. A sequence in a
hole costs nothing, and the micro-batch that it leaves becomes shorter. Where the others may end a little later, their
holes may even take a whole micro-batch, which saves its start-up.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from megatron.longseq.flexsp.plan.assign import WorkGroup, makespan
from megatron.longseq.flexsp.plan.microbatch import Effort, plan_microbatch
from megatron.longseq.flexsp.plan.problem import StepProblem

Groups = list[WorkGroup]

_TRIED = 12  # holes of a degree that a sequence is tried in, from the smallest that may do
_BISECTIONS = 6  # of the seconds by which micro-batches end later
_SOURCES = 2  # micro-batches, the shortest ones, that are tried to be dissolved


class _Holes:
    """Holes of micro-batches.

    Args:
        problem: the step.
        microbatches: groups of every micro-batch, which sequences join; groups are added on free ranks.
        later: seconds by which every micro-batch may end later.
    """

    def __init__(self, problem: StepProblem, microbatches: Sequence[Groups], later: float) -> None:
        self.problem = problem
        self._by_degree: dict[int, list[tuple[float, int, float, WorkGroup]]] = {}
        number = 0
        for groups in microbatches:
            end = makespan(groups) + later
            spare = problem.ranks - sum(group.degree for group in groups)
            if spare and 1 in problem.by_degree:  # ranks without a group
                groups += [WorkGroup(1) for _ in range(min(spare, len(problem.lengths)))]
            for group in groups:
                self._by_degree.setdefault(group.degree, []).append((self._room(group, end), number, end, group))
                number += 1
        for holes in self._by_degree.values():
            holes.sort()

    def _room(self, group: WorkGroup, end: float) -> float:
        return end - (group.seconds if group.held else self.problem.startup)

    def take(self, index: int) -> bool:
        """Add a sequence to the group that it leaves with the least time; return False where it fits into none."""
        best, chosen = float("inf"), None
        for degree, holes in self._by_degree.items():
            length, capacity = self.problem.by_degree[degree].tokens[index], self.problem.by_degree[degree].capacity
            time, tried = self.problem.time[degree], 0
            for at in range(bisect_left(holes, (self.problem.least_added[degree][index],)), len(holes)):
                _, _, end, group = holes[at]
                if group.tokens + length > capacity:
                    continue
                room = end - time(group.tokens + length, group.squares + length * length)
                if 0 <= room < best:
                    best, chosen = room, (holes, at)
                tried += 1
                if tried == _TRIED:
                    break
        if chosen is None:
            return False
        holes, at = chosen
        _, number, end, group = holes.pop(at)
        group.add(self.problem, index)
        insort(holes, (self._room(group, end), number, end, group))
        return True


def fill_holes(problem: StepProblem, microbatches: Sequence[Groups], effort: Effort) -> list[Groups]:
    """Return micro-batches that take less time, or the given ones.

    The micro-batches give away sequences in turn, the one with the shortest sequences first.

    Args:
        problem: the step.
        microbatches: groups of every micro-batch.
        effort: how long to search for new groups of a micro-batch that gave sequences away.
    """
    current = [list(groups) for groups in microbatches]
    turns = sorted(range(len(current)), key=lambda number: _mean_length(problem, current[number]))
    for number in turns:
        source = current[number]
        others = _copied([groups for other, groups in enumerate(current) if other != number])
        held = sequences(problem, source)
        holes = _Holes(problem, others, 0.0)
        rest = [index for index in held if not holes.take(index)]
        if len(rest) == len(held):
            continue
        replanned = plan_microbatch(problem, rest, effort) if rest else []
        if replanned is not None and makespan(replanned) < makespan(source):
            current = [*others[:number], replanned, *others[number:]]
    return [groups for groups in current if any(group.held for group in groups)]


def dissolve(problem: StepProblem, microbatches: Sequence[Groups]) -> list[Groups] | None:
    """Return a micro-batch less, whose sequences are in groups of the others; None where that would be slower.

    Args:
        problem: the step.
        microbatches: groups of every micro-batch.
    """
    best: list[Groups] | None = None
    order = sorted(range(len(microbatches)), key=lambda number: makespan(microbatches[number]))
    for number in order[:_SOURCES]:
        others = [groups for other, groups in enumerate(microbatches) if other != number]
        if not others:
            continue
        held, limit = sequences(problem, microbatches[number]), makespan(microbatches[number])
        if best is not None:
            limit = min(limit, _total(best) - _total(others))
        low, high = 0.0, limit / len(others)
        for step in range(_BISECTIONS):
            later = high if step == 0 else (low + high) / 2
            found = _copied(others)
            holes = _Holes(problem, found, later)
            if all(holes.take(index) for index in held):
                high = later
                if _total(found) < _total(others) + limit:
                    best, limit = found, _total(found) - _total(others)
            elif step == 0:
                break
            else:
                low = later
    return best


def sequences(problem: StepProblem, groups: Groups) -> list[int]:
    """Return the sequences of a micro-batch, longest first.

    Args:
        problem: the step.
        groups: groups of the micro-batch.

    Returns:
        Indices of the sequences.
    """
    return sorted((index for group in groups for index in group.held), key=lambda i: (-problem.lengths[i], i))


def _total(microbatches: Sequence[Groups]) -> float:
    return sum(makespan(groups) for groups in microbatches)


def _mean_length(problem: StepProblem, groups: Groups) -> float:
    held = [problem.lengths[index] for group in groups for index in group.held]
    return sum(held) / len(held)


def _copied(microbatches: Sequence[Groups]) -> list[Groups]:
    return [[one.copy() for one in groups] for groups in microbatches]
