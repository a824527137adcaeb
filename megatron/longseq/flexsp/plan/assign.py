"""Assignment of the sequences of a micro-batch to groups of given degrees.

`assign` is the longest-processing-time rule with a memory limit: each sequence, longest first, joins the group in which
it would end first. `best_fit` packs for a target time instead, and is better where a group holds few sequences.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.longseq.flexsp.plan.placement import DegreeCounts
from megatron.longseq.flexsp.plan.problem import StepProblem


@dataclass(slots=True)
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
        """Add a sequence, or with `sign` -1 remove it."""
        tokens = self.tokens_of(problem, index)
        self.tokens += sign * tokens
        self.squares += sign * tokens * tokens
        self.held.append(index) if sign > 0 else self.held.remove(index)
        self.seconds = problem.time[self.degree](self.tokens, self.squares) if self.held else 0.0

    def tokens_of(self, problem: StepProblem, index: int) -> int:
        """Return the tokens of a sequence in this group."""
        return problem.by_degree[self.degree].tokens[index]

    def with_change(self, problem: StepProblem, added: int | None, removed: int | None = None) -> float:
        """Return the seconds after adding one sequence and removing another; infinite if they do not fit."""
        a = 0 if added is None else self.tokens_of(problem, added)
        b = 0 if removed is None else self.tokens_of(problem, removed)
        tokens = self.tokens + a - b
        if tokens > problem.by_degree[self.degree].capacity:
            return float("inf")
        return problem.time[self.degree](tokens, self.squares + a * a - b * b) if tokens else 0.0


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
    heaps: list[tuple[int, list[tuple[float, int, WorkGroup]]]] = []
    number = 0
    for degree, count in reversed(counts):
        heap = [(0.0, number + one, WorkGroup(degree)) for one in range(count)]
        number += count
        heaps.append((degree, heap))
    classes = [
        (heap, problem.time[degree], problem.by_degree[degree].tokens, problem.by_degree[degree].capacity)
        for degree, heap in heaps
    ]
    for index in indices:
        best, chosen = limit, None
        for one in classes:
            heap, time, tokens, capacity = one
            length = tokens[index]
            if length > capacity:
                continue
            position, group = 0, heap[0][2]
            if group.tokens + length > capacity:
                open_ones = [at for at, entry in enumerate(heap) if entry[2].tokens + length <= capacity]
                if not open_ones:
                    continue
                position = min(open_ones, key=lambda at: heap[at][:2])
                group = heap[position][2]
            end = time(group.tokens + length, group.squares + length * length)
            if end < best:
                best, chosen = end, (one, position, length)
        if chosen is None:
            return None
        (heap, *_), position, length = chosen
        _, order, group = heap[position]
        group.tokens += length
        group.squares += length * length
        group.held.append(index)
        group.seconds = best
        if position == 0:
            heapq.heapreplace(heap, (best, order, group))
        else:
            heap[position] = (best, order, group)
            heapq.heapify(heap)
    return [entry[2] for _, heap in heaps for entry in heap]


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
    groups = [WorkGroup(degree) for degree, count in reversed(counts) for _ in range(count)]
    for index in indices:
        best, chosen, end = float("inf"), None, 0.0
        for group in groups:
            one = problem.by_degree[group.degree]
            length = one.tokens[index]
            room = one.capacity - group.tokens - length
            if room < 0:
                continue
            seconds = problem.time[group.degree](group.tokens + length, group.squares + length * length)
            if seconds > target:
                continue
            key: float = room if by_memory else min(room / one.capacity, 1 - seconds / target)
            if key < best:
                best, chosen, end = key, group, seconds
        if chosen is None:
            return None
        length = chosen.tokens_of(problem, index)
        chosen.tokens += length
        chosen.squares += length * length
        chosen.held.append(index)
        chosen.seconds = end
    return groups


def makespan(groups: Sequence[WorkGroup]) -> float:
    """Return the seconds of the slowest group."""
    return max((group.seconds for group in groups), default=0.0)
