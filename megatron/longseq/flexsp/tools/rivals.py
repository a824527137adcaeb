"""Baselines of the simulated tables: how other systems would run the same sequences under the same cost model."""

from megatron.longseq.flexsp.plan.assign import WorkGroup, assign, makespan
from megatron.longseq.flexsp.plan.baselines import balanced, homogeneous, static_plan, total
from megatron.longseq.flexsp.plan.placement import DegreeCounts
from megatron.longseq.flexsp.plan.problem import StepProblem
from megatron.longseq.flexsp.plan.split import least_microbatches, splits

Groups = list[WorkGroup]


def holding_degrees(problem: StepProblem, context: int) -> tuple[int, ...]:
    """Return the degrees whose groups hold the longest sequence that the data may have.

    Args:
        problem: the step.
        context: tokens of the longest sequence.
    """
    return tuple(degree for degree, one in problem.by_degree.items() if one.capacity >= context)


def static_seconds(problem: StepProblem, degree: int) -> float:
    """Return the seconds with one degree for all steps: best-fit packing to nine tenths of the memory.

    The result is infinite if no group of this degree holds the longest sequence.

    Args:
        problem: the step.
        degree: ranks of a group.
    """
    plan = static_plan(problem, degree, 0.9)
    return float("inf") if plan is None else total(plan)


def sorted_static_seconds(problem: StepProblem, degree: int) -> float:
    """Return the seconds of sorted micro-batches, all with one degree: the gain of sorting and the blaster alone.

    Args:
        problem: the step.
        degree: ranks of a group.
    """
    counts, best = homogeneous(problem, degree), float("inf")
    first = least_microbatches(problem)
    for number in range(first, first + 6):
        for parts in splits(problem, min(number, len(problem.lengths))):
            found = [assign(problem, part, counts) for part in parts]
            best = min(best, sum(float("inf") if groups is None else makespan(groups) for groups in found))
    return best


def balanced_seconds(problem: StepProblem, degree: int) -> float:
    """Return the seconds of a balanced split over groups of one degree, as WLB-LLM balances work.

    Args:
        problem: the step.
        degree: ranks of a group.
    """
    plan = balanced(problem, degree)
    return float("inf") if plan is None else total(plan)


def meshes(problem: StepProblem, context: int) -> list[DegreeCounts]:
    """Return static divisions of the ranks into groups of one or two degrees, the larger of which holds the context.

    Args:
        problem: the step.
        context: tokens of the longest sequence.
    """
    found = []
    for degree in holding_degrees(problem, context):
        for count in range(1, problem.ranks // degree + 1):
            rest = problem.ranks - count * degree
            for other in problem.degrees:
                more = rest // other
                if other < degree and (more or not rest):
                    found.append(((degree, count), (other, more)) if more else ((degree, count),))
    return [mesh for mesh in dict.fromkeys(found) if problem.placement.fits(mesh)]


def balanced_mesh_seconds(problem: StepProblem, mesh: DegreeCounts) -> float:
    """Return the seconds of a balanced split over the groups of a static division of the ranks.

    Sequences, longest first, join the group of all micro-batches in which they end first, as WLB-LLM balances work over
    groups of one degree. The number of micro-batches is the least with which all sequences find a place.

    Args:
        problem: the step.
        mesh: pairs of a degree and the number of its groups.
    """
    count = least_microbatches(problem)
    while count <= len(problem.lengths):
        groups = assign(problem, problem.order, tuple((degree, count * number) for degree, number in mesh))
        if groups is not None:
            groups.sort(key=lambda group: (group.degree, -group.seconds))
            slowest = [0.0] * count
            for degree, number in mesh:
                own = [group for group in groups if group.degree == degree]
                for at in range(count):
                    slowest[at] = max(slowest[at], makespan(own[at * number : (at + 1) * number]))
            return sum(slowest)
        count += 1
    return float("inf")


def smallest_degree(problem: StepProblem, index: int) -> int:
    """Return the smallest degree that holds a sequence: the rule of Megatron-Core's schedulers.

    Args:
        problem: the step.
        index: index of the sequence.
    """
    return next(degree for degree, one in problem.by_degree.items() if one.tokens[index] <= one.capacity)


def upstream_seconds(problem: StepProblem) -> float:
    """Return the seconds of Megatron-Core's `BalancedCPScheduler`.

    Every sequence is a forward and backward pass of its own, on the smallest degree that holds it. Passes are placed on
    aligned ranks, those with the largest degree and the longest first, where they can start earliest.
    """
    free = [0.0] * problem.ranks
    passes = []
    for index in problem.order:
        degree = smallest_degree(problem, index)
        tokens = problem.by_degree[degree].tokens[index]
        passes.append((degree, problem.time[degree](tokens, tokens * tokens)))
    for degree, seconds in sorted(passes, reverse=True):
        start = min(problem.placement.slots(degree), key=lambda first: max(free[first : first + degree]))
        end = max(free[start : start + degree]) + seconds
        free[start : start + degree] = [end] * degree
    return max(free)


def development_seconds(problem: StepProblem) -> float:
    """Return the seconds of the rule of upstream's development branch (`DefaultDynamicCPScheduler`).

    Sequences are packed, longest first, on the smallest degree that holds them. A sequence opens a group while ranks
    are free; otherwise it joins the group of its degree with the least squared tokens per rank. What does not fit into
    a micro-batch goes into the next one. Ranks that are left widen the group with the most squared tokens per rank.
    """
    left, seconds = list(problem.order), 0.0
    while left:
        groups: Groups = []
        free, rest = problem.ranks, []
        for index in left:
            degree = smallest_degree(problem, index)
            one = problem.by_degree[degree]
            if degree <= free:
                groups.append(WorkGroup(degree))
                groups[-1].add(problem, index)
                free -= degree
                continue
            able = [
                group
                for group in groups
                if group.degree >= degree
                and group.tokens + one.tokens[index] <= problem.by_degree[group.degree].capacity
            ]
            if able:
                min(able, key=lambda group: group.squares / group.degree).add(problem, index)
            else:
                rest.append(index)
        seconds += makespan(_widened(problem, groups, free))
        left = rest
    return seconds


def _widened(problem: StepProblem, groups: Groups, free: int) -> Groups:
    while free:
        slowest = max(groups, key=lambda group: group.squares / group.degree)
        if 2 * slowest.degree not in problem.by_degree or slowest.degree > free:
            break
        free -= slowest.degree
        wide = WorkGroup(2 * slowest.degree)
        for index in slowest.held:
            wide.add(problem, index)
        groups = [group for group in groups if group is not slowest] + [wide]
    return groups
