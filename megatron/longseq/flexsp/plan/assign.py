"""Assignment of the sequences of a micro-batch to groups of given degrees.

`assign` is the longest-processing-time rule with a memory limit: each sequence, longest first, joins the group in which
it would end first. `best_fit` packs for a target time instead, and is better where a group holds few sequences.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.longseq.flexsp.plan.placement import DegreeCounts
from megatron.longseq.flexsp.plan.problem import Seconds, StepProblem


@dataclass(slots=True, eq=False)
class WorkGroup:
    """A group under construction.

    Attributes:
        degree: number of ranks.
        seconds: of the fastest kind.
        tokens, squares: sums over its sequences.
        held: its sequences.
    """

    degree: int
    seconds: float = 0.0
    tokens: int = 0
    squares: int = 0
    held: list[int] = field(default_factory=list)

    def add(self, problem: StepProblem, index: int, sign: int = 1) -> None:
        """Add a sequence, or with `sign` -1 remove it.

        Args:
            problem: the step.
            index: index of the sequence.
            sign: 1 or -1.
        """
        tokens = self.tokens_of(problem, index)
        self.tokens += sign * tokens
        self.squares += sign * tokens * tokens
        self.held.append(index) if sign > 0 else self.held.remove(index)
        self.seconds = problem.time[self.degree](self.tokens, self.squares) if self.held else 0.0

    def copy(self) -> "WorkGroup":
        """Return a copy that can be changed by itself."""
        return WorkGroup(self.degree, self.seconds, self.tokens, self.squares, list(self.held))

    def tokens_of(self, problem: StepProblem, index: int) -> int:
        """Return the tokens of a sequence in this group."""
        return problem.by_degree[self.degree].tokens[index]

    def with_change(self, problem: StepProblem, added: int | None, removed: int | None = None) -> float:
        """Return the seconds after adding one sequence and removing another; infinite if they do not fit.

        Args:
            problem: the step.
            added, removed: indices of sequences; None: none.
        """
        a = 0 if added is None else self.tokens_of(problem, added)
        b = 0 if removed is None else self.tokens_of(problem, removed)
        tokens = self.tokens + a - b
        if tokens > problem.by_degree[self.degree].capacity:
            return float("inf")
        return problem.time[self.degree](tokens, self.squares + a * a - b * b) if tokens else 0.0


# Groups of a degree, those of them that are left, capacity, tokens and least seconds of every sequence, and time.
_BestFitDegree = tuple[list[WorkGroup], list[WorkGroup], int, Sequence[int], list[float], Seconds]


class _Open:
    """The groups of one degree that sequences, longest first, may still join."""

    __slots__ = ("_aside", "_heap", "_time", "_tokens", "added", "capacity", "degree", "groups")

    def __init__(self, problem: StepProblem, degree: int, count: int, first: int) -> None:
        self.groups = [WorkGroup(degree) for _ in range(count)]
        self.degree, self.capacity = degree, problem.by_degree[degree].capacity
        self.added = problem.least_added[degree]
        self._tokens, self._time = problem.by_degree[degree].tokens, problem.time[degree]
        self._heap = [(0.0, first + number, group) for number, group in enumerate(self.groups)]
        self._aside: list[tuple[int, int, WorkGroup]] = []  # without room for the last sequence, most room first

    def end(self, index: int, limit: float) -> float:
        """Return when a sequence would end in the group that ends first and has room; infinite at the limit or above.

        Sequences do not become longer, so a group without room has room again only for a shorter one.
        """
        length, heap, aside = self._tokens[index], self._heap, self._aside
        while aside and -aside[0][0] >= length:
            _, number, group = heapq.heappop(aside)
            heapq.heappush(heap, (group.seconds, number, group))
        while heap and heap[0][2].tokens + length > self.capacity:
            _, number, group = heapq.heappop(heap)
            heapq.heappush(aside, (group.tokens - self.capacity, number, group))
        if not heap or heap[0][0] + self.added[index] >= limit:
            return float("inf")
        group = heap[0][2]
        return self._time(group.tokens + length, group.squares + length * length)

    def join(self, index: int, end: float) -> None:
        """Add a sequence to the group of the last `end`."""
        _, number, group = self._heap[0]
        length = self._tokens[index]
        group.tokens += length
        group.squares += length * length
        group.held.append(index)
        group.seconds = end
        heapq.heapreplace(self._heap, (end, number, group))


def assign(
    problem: StepProblem, indices: Sequence[int], counts: DegreeCounts, limit: float = float("inf")
) -> list[WorkGroup] | None:
    """Return groups of the given degrees with all sequences, or None where one does not fit below the limit.

    Args:
        problem: the step.
        indices: sequences, longest first.
        counts: degrees of the groups.
        limit: seconds that every group must stay below.
    """
    classes: list[_Open] = []
    number = 0
    for degree, count in reversed(counts):
        classes.append(_Open(problem, degree, count, number))
        number += count
    for index in indices:
        best, chosen = limit, None
        for one in classes:
            end = one.end(index, best)
            if end < best:
                best, chosen = end, one
        if chosen is None:
            return None
        chosen.join(index, best)
    return [group for one in classes for group in one.groups]


def best_fit(
    problem: StepProblem, indices: Sequence[int], counts: DegreeCounts, target: float, by_memory: bool
) -> list[WorkGroup] | None:
    """Return groups that all end within a target time, or None where a sequence finds no place.

    Each sequence joins the group that it leaves with the least room.

    Args:
        problem: the step.
        indices: sequences, longest first.
        counts: degrees of the groups.
        target: seconds that no group may exceed.
        by_memory: whether room is memory alone; otherwise it is the scarcer of memory and time.
    """
    degrees = []
    for degree, count in reversed(counts):
        one = problem.by_degree[degree]
        groups = [WorkGroup(degree) for _ in range(count)]
        degrees.append(
            (groups, list(groups), one.capacity, one.tokens, problem.least_added[degree], problem.time[degree])
        )
    for index in indices:
        best, chosen, end = float("inf"), None, 0.0
        for _, left, capacity, tokens, added, time in degrees:
            length, least = tokens[index], added[index]
            for group in left:
                room = capacity - group.tokens - length
                if room < 0 or group.seconds + least > target or (by_memory and room >= best):
                    continue
                seconds = time(group.tokens + length, group.squares + length * length)
                key: float = room if by_memory else min(room / capacity, 1 - seconds / target)
                if key < best and seconds <= target:
                    best, chosen, end = key, group, seconds
                if not group.tokens:  # as all that follow
                    break
        if chosen is None:
            return None
        length = chosen.tokens_of(problem, index)
        chosen.tokens += length
        chosen.squares += length * length
        chosen.held.append(index)
        chosen.seconds = end
        _close(degrees, chosen, indices[-1], target)
    return [group for groups, *_ in degrees for group in groups]


def _close(degrees: Sequence[_BestFitDegree], group: WorkGroup, shortest: int, target: float) -> None:
    """Leave out a group that has no room, or no time, for the shortest sequence."""
    for groups, left, capacity, tokens, added, _ in degrees:
        if groups[0].degree == group.degree:
            if group.tokens + tokens[shortest] > capacity or group.seconds + added[shortest] > target:
                left.remove(group)
            return


def makespan(groups: Sequence[WorkGroup]) -> float:
    """Return the seconds of the slowest group."""
    return max((group.seconds for group in groups), default=0.0)
