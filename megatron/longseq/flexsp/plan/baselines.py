"""Plans with groups of one degree: for the whole step (static), or chosen for every micro-batch (sorted)."""

import heapq
from bisect import bisect_right, insort
from collections.abc import Sequence

from megatron.longseq.flexsp.plan.assign import WorkGroup, assign, makespan
from megatron.longseq.flexsp.plan.degree_sets import lower_estimate
from megatron.longseq.flexsp.plan.placement import DegreeCounts
from megatron.longseq.flexsp.plan.problem import StepProblem, count_degrees
from megatron.longseq.flexsp.plan.split import least_microbatches, splits

Groups = list[WorkGroup]

_FILLING = (0.9, 1.0)  # of a group's memory that static packing uses; the paper's baselines leave a tenth
_SPLITS = 3  # of each number of micro-batches, those with the smallest estimates
_COUNTS = 4  # numbers of micro-batches of sorted plans, from the least that works


def homogeneous(problem: StepProblem, degree: int) -> DegreeCounts:
    """Return as many groups of a degree as the ranks can hold, and as there are sequences.

    Args:
        problem: the step.
        degree: ranks of a group.
    """
    return count_degrees([degree] * min(len(problem.placement.slots(degree)), len(problem.lengths)))


def total(found: Sequence[Groups]) -> float:
    """Return the seconds of micro-batches."""
    return sum(makespan(groups) for groups in found)


def static(problem: StepProblem) -> list[Groups] | None:
    """Return the fastest plan whose groups have one degree; None if no degree holds the longest sequence.

    Sequences are packed into groups as full as possible (best fit, longest first), in whatever micro-batch. The groups
    of the last micro-batch are evened out.
    """
    plans = [
        plan
        for degree in problem.degrees
        for filling in _FILLING
        if (plan := static_plan(problem, degree, filling)) is not None
    ]
    return min(plans, key=total, default=None)


def static_plan(problem: StepProblem, degree: int, filling: float) -> list[Groups] | None:
    """Return the plan with groups of one degree; None if it does not hold the longest sequence.

    Args:
        problem: the step.
        degree: ranks of every group.
        filling: share of a group's memory that is used, where the longest sequence does not need more.
    """
    one = problem.by_degree[degree]
    if max(one.tokens) > one.capacity:
        return None
    packs = _best_fit(problem, degree, max(int(filling * one.capacity), *one.tokens))
    size = len(problem.placement.slots(degree))
    plan = [packs[begin : begin + size] for begin in range(0, len(packs), size)]
    last = sorted((index for group in plan[-1] for index in group.held), key=lambda i: (-problem.lengths[i], i))
    evened = assign(problem, last, homogeneous(problem, degree))
    if evened is not None and makespan(evened) < makespan(plan[-1]):
        plan[-1] = evened
    return plan


def _best_fit(problem: StepProblem, degree: int, limit: int) -> Groups:
    """Pack sequences into groups of a degree, longest first, each where it leaves the least room."""
    packs: Groups = []
    by_tokens: list[tuple[int, int]] = []  # of every pack, and its number, the first one last
    for index in problem.order:
        length = problem.by_degree[degree].tokens[index]
        at = bisect_right(by_tokens, (limit - length, 0)) - 1
        if at >= 0:
            number = -by_tokens.pop(at)[1]
        else:
            number = len(packs)
            packs.append(WorkGroup(degree))
        packs[number].add(problem, index)
        insort(by_tokens, (packs[number].tokens, -number))
    return packs


def sorted_homogeneous(problem: StepProblem) -> list[Groups] | None:
    """Return the fastest plan of sorted micro-batches with one degree each; None if there is none."""
    best: list[Groups] | None = None
    left, count = _COUNTS, least_microbatches(problem)
    while count <= len(problem.lengths) and left:
        ordered = sorted(splits(problem, count), key=lambda parts: sum(lower_estimate(problem, part) for part in parts))
        plans = [plan for parts in ordered[:_SPLITS] if (plan := _by_part(problem, parts)) is not None]
        best = min([*plans, *([best] if best else [])], key=total, default=None)
        left -= best is not None
        count += 1 if best is not None else max(1, count // 8)
    if best is None and len(problem.lengths):
        best = _by_part(problem, [(index,) for index in problem.order])
    return best


def _by_part(problem: StepProblem, parts: Sequence[Sequence[int]]) -> list[Groups] | None:
    plan = []
    for part in parts:
        best: Groups | None = None
        for degree in problem.degrees:
            limit = float("inf") if best is None else makespan(best)
            best = assign(problem, part, homogeneous(problem, degree), limit) or best
        if best is None:
            return None
        plan.append(best)
    return plan


def balanced(problem: StepProblem, degree: int) -> list[Groups] | None:
    """Return a plan with one degree whose micro-batches and groups have balanced work, as WLB-LLM (arXiv 2503.17924).

    Sequences, longest first, join the group with the least work of all micro-batches; the number of micro-batches is
    the least that holds all of them, or the next ones.

    Args:
        problem: the step.
        degree: ranks of a group.

    Returns:
        The groups of every micro-batch; None if no group of this degree holds the longest sequence.
    """
    one = problem.by_degree[degree]
    if max(one.tokens) > one.capacity:
        return None
    size = len(problem.placement.slots(degree))
    count = -(-sum(one.tokens) // (size * one.capacity))
    while count <= len(problem.lengths):
        heap = [(0.0, number, WorkGroup(degree)) for number in range(size * count)]
        if _spread(problem, degree, heap):
            groups = sorted((group for _, _, group in heap), key=lambda group: -group.seconds)
            return [groups[begin : begin + size] for begin in range(0, len(groups), size)]
        count += 1
    return None


def _spread(problem: StepProblem, degree: int, heap: list[tuple[float, int, WorkGroup]]) -> bool:
    """Add every sequence to the group with the least work that has memory; return False where none has."""
    one = problem.by_degree[degree]
    for index in problem.order:
        full = []
        while heap and heap[0][2].tokens + one.tokens[index] > one.capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            heap.extend(full)
            return False
        _, number, group = heap[0]
        group.add(problem, index)
        heapq.heapreplace(heap, (group.seconds, number, group))
        for entry in full:
            heapq.heappush(heap, entry)
    return True
