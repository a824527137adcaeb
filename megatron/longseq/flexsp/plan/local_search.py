"""Moves and swaps of sequences out of the slowest group of a micro-batch."""

from collections.abc import Sequence

from megatron.longseq.flexsp.plan.assign import WorkGroup
from megatron.longseq.flexsp.plan.problem import StepProblem

_PARTNERS = 24  # least loaded groups of each degree that a move or a swap is tried with
_LEAST_GAIN = 1e-6


def improve(problem: StepProblem, groups: Sequence[WorkGroup], iterations: int) -> None:
    """Shorten a micro-batch in place: move or swap sequences of the slowest group until nothing helps.

    Args:
        problem: the step.
        groups: groups of a micro-batch.
        iterations: most moves and swaps.
    """
    for _ in range(iterations):
        slowest = max(groups, key=lambda group: group.seconds)
        change = _best_change(problem, slowest, _partners(groups, slowest))
        if change is None:
            return
        partner, given, taken = change
        slowest.add(problem, given, -1)
        partner.add(problem, given)
        if taken is not None:
            partner.add(problem, taken, -1)
            slowest.add(problem, taken)


def _partners(groups: Sequence[WorkGroup], slowest: WorkGroup) -> list[WorkGroup]:
    by_degree: dict[int, list[WorkGroup]] = {}
    for group in groups:
        if group is not slowest:
            by_degree.setdefault(group.degree, []).append(group)
    each = (sorted(held, key=lambda group: group.seconds)[:_PARTNERS] for held in by_degree.values())
    return [group for held in each for group in held]


def _best_change(
    problem: StepProblem, slowest: WorkGroup, partners: Sequence[WorkGroup]
) -> tuple[WorkGroup, int, int | None] | None:
    """Return the move or swap after which the slower of the two groups is fastest: partner, given, taken."""
    best = slowest.seconds * (1 - _LEAST_GAIN)
    change: tuple[WorkGroup, int, int | None] | None = None
    given_lengths: set[int] = set()
    for given in sorted(slowest.held, key=lambda index: -problem.lengths[index]):
        if problem.lengths[given] in given_lengths:
            continue
        given_lengths.add(problem.lengths[given])
        without = slowest.with_change(problem, None, given)
        for partner in partners:
            if without >= best:
                break
            end = max(without, partner.with_change(problem, given))
            if end < best:
                best, change = end, (partner, given, None)
        for partner in partners:
            taken_lengths: set[int] = set()
            for taken in partner.held:
                length = problem.lengths[taken]
                if length >= problem.lengths[given] or length in taken_lengths:
                    continue
                taken_lengths.add(length)
                there = partner.with_change(problem, given, taken)
                if there >= best:
                    continue
                end = max(there, slowest.with_change(problem, taken, given))
                if end < best:
                    best, change = end, (partner, given, taken)
    return change
