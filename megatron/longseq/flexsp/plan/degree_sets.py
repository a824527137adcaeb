"""Candidates for the degrees of a micro-batch's groups, and small changes of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement

import numpy as np

from megatron.longseq.flexsp.plan.placement import DegreeCounts, first_free
from megatron.longseq.flexsp.plan.problem import StepProblem, count_degrees

Exchange = tuple[DegreeCounts, DegreeCounts]  # degrees to remove and to add, of as many ranks

_TARGETS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.8, 2.5)  # of the lower estimate


def lower_estimate(problem: StepProblem, indices: Sequence[int]) -> float:
    """Return seconds that no micro-batch with these sequences is below: the longest one, and an even share of work.

    Args:
        problem: the step.
        indices: sequences of the micro-batch.
    """
    longest = max(problem.least[index][0] for index in indices)
    return max(longest, problem.startup + sum(problem.least[index][1] for index in indices) / problem.ranks)


def candidates(problem: StepProblem, indices: Sequence[int], estimate: float) -> list[DegreeCounts]:
    """Return sets of degrees to try, without repetition.

    Some have one degree for all groups. For the others, each sequence takes the degree with the least work among those
    that end within a target time, and each degree gets the groups that this work and its tokens need.

    Args:
        problem: the step.
        indices: sequences of the micro-batch.
        estimate: see `lower_estimate`.
    """
    found: dict[DegreeCounts, None] = {}
    for degree in problem.degrees:
        counts = count_degrees([degree] * min(len(problem.placement.slots(degree)), len(problem.lengths)))
        if problem.placement.fits(counts):
            found[fill(problem, counts)] = None
    for factor in _TARGETS:
        needs = _needs(problem, indices, estimate * factor)
        for rounding in (math.ceil, round, math.floor):
            counts = tuple((d, int(rounding(n))) for d, n in sorted(needs.items(), reverse=True) if rounding(n) > 0)
            counts = _trim(problem, counts)
            if counts and problem.placement.fits(counts):
                found[fill(problem, counts)] = None
    return list(found)


def _needs(problem: StepProblem, indices: Sequence[int], target: float) -> Mapping[int, float]:
    """Return the number of groups of each degree that the sequences need to end within a target time."""
    held = np.array(indices)
    startup = {degree: min(one.startup for one in problem.by_degree[degree].kinds) for degree in problem.degrees}
    ends = np.array([problem.alone[degree][held] for degree in problem.degrees])
    spent = np.array([(end - startup[degree]) * degree for degree, end in zip(problem.degrees, ends, strict=True)])
    # The degree with the least work among those on which a sequence ends in time, or among all that hold it.
    in_time = np.where(ends <= target, spent, np.inf)
    fitting = np.where(np.isfinite(ends), spent, np.inf)
    chosen = np.where(np.isfinite(in_time).any(axis=0), np.argmin(in_time, axis=0), np.argmin(fitting, axis=0))
    needs = {}
    for number, degree in enumerate(problem.degrees):
        own = chosen == number
        tokens = sum(problem.by_degree[degree].tokens[index] for index in held[own])
        seconds = float((ends[number][own] - startup[degree]).sum())
        room = max(target - startup[degree], 1e-12)
        needs[degree] = max(tokens / problem.by_degree[degree].capacity, seconds / room)
    return needs


def _trim(problem: StepProblem, counts: DegreeCounts) -> DegreeCounts:
    """Remove groups, those of the smallest degrees first, until the ranks suffice."""
    left = dict(counts)
    excess = sum(degree * count for degree, count in counts) - problem.ranks
    for degree in sorted(left):
        if excess <= 0:
            break
        removed = min(left[degree], -(-excess // degree))
        left[degree] -= removed
        excess -= removed * degree
    return tuple((degree, count) for degree, count in sorted(left.items(), reverse=True) if count)


def fill(problem: StepProblem, counts: DegreeCounts) -> DegreeCounts:
    """Add groups of the largest degrees that have a place on the ranks that are left.

    A step needs at most as many groups of a degree as it has sequences.

    Args:
        problem: the step.
        counts: pairs of a degree and the number of its groups.
    """
    if problem.placement.place(counts) is None:
        return counts
    free, filled = problem.placement.free(counts), dict(counts)
    left = sum(free)
    for degree in reversed(problem.degrees):
        slots, at = problem.placement.slots(degree), 0
        while degree <= left and filled.get(degree, 0) < len(problem.lengths):
            at = first_free(free, slots, degree, at)
            if at == len(slots):
                break
            free[slots[at] : slots[at] + degree] = bytes(degree)
            left -= degree
            filled[degree] = filled.get(degree, 0) + 1
    more = tuple(sorted(filled.items(), reverse=True))
    return more if problem.placement.fits(more) else counts


def exchanges(problem: StepProblem) -> list[Exchange]:
    """Return splits of one degree into two or three others, and the reverse."""
    found: list[Exchange] = []
    for parts in (2, 3):
        for added in combinations_with_replacement(problem.degrees, parts):
            if sum(added) in problem.by_degree:
                one, several = count_degrees([sum(added)]), count_degrees(added)
                found += [(one, several), (several, one)]
    return found


def neighbours(problem: StepProblem, counts: DegreeCounts, found: Sequence[Exchange]) -> Iterator[DegreeCounts]:
    """Yield the sets of degrees that one exchange makes of `counts`, and then those of two.

    Args:
        problem: the step.
        counts: pairs of a degree and the number of its groups.
        found: exchanges to try, in this order.
    """
    nearest = []
    for one in found:
        after = _exchanged(problem, counts, one)
        if after is not None:
            nearest.append(after)
            yield after
    for near in nearest:
        for one in found:
            after = _exchanged(problem, near, one)
            if after is not None and after != counts:
                yield after


def _exchanged(problem: StepProblem, counts: DegreeCounts, exchange: Exchange) -> DegreeCounts | None:
    removed, added = exchange
    left = dict(counts)
    for degree, count in removed:
        left[degree] = left.get(degree, 0) - count
        if left[degree] < 0:
            return None
    for degree, count in added:
        left[degree] = left.get(degree, 0) + count
    after = tuple((degree, count) for degree, count in sorted(left.items(), reverse=True) if count)
    return after if problem.placement.fits(after) else None
