"""The fastest plan of a step: by dynamic programming over subsets (`subsets`), or by an integer program.

The integer program is that of FlexSP, equations 5 to 10, extended by kinds and by all micro-batches at once. Every
micro-batch has as many possible groups of each kind as the ranks hold. Binary variables say which of them exist and
which sequence is in which; the seconds of a micro-batch are at least those of each of its groups. HiGHS solves it for
every number of micro-batches whose bound (`step_bound`) is below the best plan so far. It is for steps that have too
many subsets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

from megatron.longseq.flexsp.plan.assign import WorkGroup, makespan
from megatron.longseq.flexsp.plan.cost import KindCost
from megatron.longseq.flexsp.plan.problem import StepProblem, count_degrees
from megatron.longseq.flexsp.plan.split import least_microbatches
from megatron.longseq.flexsp.plan.step_bound import CountBounds
from megatron.longseq.flexsp.plan.subsets import solve_by_subsets

_MOST = 6_000  # binary variables
_NODES = 200_000  # of the branch and bound: a limit that does not depend on the machine
EXACT_GAP = 1e-4


@dataclass(frozen=True, slots=True)
class _Slot:
    """A possible group."""

    microbatch: int
    degree: int
    kind: KindCost
    is_next: bool  # of the same micro-batch and kind as the slot before


def solve_exactly(
    problem: StepProblem, known: Sequence[Sequence[WorkGroup]], idle: Callable[[int], float] = lambda number: 0.0
) -> list[list[WorkGroup]]:
    """Return the fastest plan.

    Args:
        problem: the step.
        known: a plan of it, which is returned where no other is faster.
        idle: seconds that are added to a plan with that many micro-batches, for those without sequences.

    Raises:
        ValueError: The step is too large for the exact program, or HiGHS stopped before it had proved its plan.
    """
    best = [list(groups) for groups in known]
    found = solve_by_subsets(problem, idle)
    if found is None:
        return solve_by_program(problem, best, idle)
    return found if _seconds(found, idle) < _seconds(best, idle) else best


def solve_by_program(
    problem: StepProblem, known: list[list[WorkGroup]], idle: Callable[[int], float]
) -> list[list[WorkGroup]]:
    """Return the fastest plan, by the integer program; see `solve_exactly`."""
    best, bounds, count = known, CountBounds(problem), least_microbatches(problem)
    while count <= len(problem.lengths):
        limit = _seconds(best, idle) - idle(count)
        if bounds.simple(count) >= limit:
            # `simple` grows by at least as much as `idle` may fall.
            if count * problem.startup >= limit:
                break
        elif bounds.of(count) < limit * (1 - EXACT_GAP):
            best = _solve(problem, count, limit) or best
        count += 1
    return best


def _seconds(plan: Sequence[Sequence[WorkGroup]], idle: Callable[[int], float]) -> float:
    return sum(makespan(groups) for groups in plan) + idle(len(plan))


def _slots(problem: StepProblem, count: int) -> list[_Slot]:
    slots = []
    for microbatch in range(count):
        for degree, each in problem.by_degree.items():
            for kind in each.kinds:
                number = min(len(problem.placement.slots(degree)), len(problem.lengths))
                slots += [_Slot(microbatch, degree, kind, at > 0) for at in range(number)]
    size = len(slots) * (len(problem.lengths) + 1)
    if size > _MOST:
        raise ValueError(
            f"exact plan of {len(problem.lengths)} sequences on {problem.ranks} ranks in {count} micro-batches: "
            f"it needs {size} binary variables, more than {_MOST}; "
            "give fewer sequences, degrees or kinds, or use the heuristic"
        )
    return slots


def _solve(problem: StepProblem, count: int, limit: float) -> list[list[WorkGroup]] | None:
    """Return the fastest plan of `count` micro-batches, or None where none is faster than the limit."""
    slots = _slots(problem, count)
    sequences, begin = len(problem.lengths), count + len(slots)
    width = begin + sequences * len(slots)  # seconds of micro-batches, groups, sequences in groups
    rows: list[tuple[list[int], list[float], float, float]] = []  # columns, coefficients, lower and upper limit
    for index in range(sequences):
        rows.append(([begin + at * sequences + index for at in range(len(slots))], [1.0] * len(slots), 1, 1))
    for microbatch in range(count):
        degrees = [(count + at, float(slot.degree)) for at, slot in enumerate(slots) if slot.microbatch == microbatch]
        rows.append(([col for col, _ in degrees], [degree for _, degree in degrees], -np.inf, problem.ranks))
        rows.append(([col for col, _ in degrees], [1.0] * len(degrees), 1, np.inf))  # `idle` counts those without work
    for at, slot in enumerate(slots):
        rows += _slot_rows(problem, slot, at, count, begin)
    # Micro-batches in descending order of their seconds; the sum is below the limit.
    rows += [([number + 1, number], [1.0, -1.0], -np.inf, 0.0) for number in range(count - 1)]
    rows.append((list(range(count)), [1.0] * count, -np.inf, limit * (1 - EXACT_GAP)))
    goal, whole, most = np.zeros(width), np.ones(width), np.ones(width)
    goal[:count], whole[:count], most[:count] = 1, 0, limit
    for at, slot in enumerate(slots):
        each = problem.by_degree[slot.degree]
        for index in range(sequences):
            most[begin + at * sequences + index] = each.tokens[index] <= each.capacity
    lengths = [len(cols) for cols, *_ in rows]
    matrix = csr_matrix(
        (
            np.concatenate([values for _, values, *_ in rows]),
            np.concatenate([cols for cols, *_ in rows]),
            np.concatenate(([0], np.cumsum(lengths))),
        ),
        shape=(len(rows), width),
    )
    found = milp(
        goal,
        integrality=whole,
        bounds=Bounds(0, most),
        constraints=LinearConstraint(matrix, [row[2] for row in rows], [row[3] for row in rows]),
        options={"node_limit": _NODES, "mip_rel_gap": EXACT_GAP},
    )
    if found.status == 2:  # infeasible
        return None
    if found.status != 0:
        raise ValueError(
            f"exact plan of {sequences} sequences on {problem.ranks} ranks in {count} micro-batches: HiGHS stopped "
            f"before its plan was proved ({found.message}); give fewer sequences, or use the heuristic"
        )
    return _plan(problem, slots, count, found.x[begin:])


def _slot_rows(
    problem: StepProblem, slot: _Slot, at: int, count: int, begin: int
) -> list[tuple[list[int], list[float], float, float]]:
    """Return the limits of a possible group: memory, seconds, existence, and order among equal ones."""
    each, sequences = problem.by_degree[slot.degree], len(problem.lengths)
    own = [begin + at * sequences + index for index in range(sequences)]
    tokens = [float(length) for length in each.tokens]
    rows = [([*own, count + at], [*tokens, -float(each.capacity)], -np.inf, 0.0)]
    for token, square in slot.kind.pieces():
        seconds = [token * length + square * length * length for length in tokens]
        rows.append(([*own, count + at, slot.microbatch], [*seconds, slot.kind.startup, -1.0], -np.inf, 0.0))
    rows += [([col, count + at], [1.0, -1.0], -np.inf, 0.0) for col in own]
    rows.append(([*own, count + at], [*[1.0] * len(own), -1.0], 0.0, np.inf))
    if slot.is_next:
        rows.append(([count + at, count + at - 1], [1.0, -1.0], -np.inf, 0.0))
    return rows


def _plan(
    problem: StepProblem, slots: Sequence[_Slot], count: int, assigned: NDArray[np.float64]
) -> list[list[WorkGroup]]:
    plan: list[list[WorkGroup]] = [[] for _ in range(count)]
    sequences = len(problem.lengths)
    for at, slot in enumerate(slots):
        group = WorkGroup(slot.degree)
        for index in range(sequences):
            if assigned[at * sequences + index] > 0.5:
                group.add(problem, index)
        if group.held:
            plan[slot.microbatch].append(group)
    plan = [groups for groups in plan if groups]
    for groups in plan:
        counts = count_degrees(group.degree for group in groups)
        if not problem.placement.fits(counts):
            raise ValueError(
                f"exact plan: groups of degrees {counts} have no aligned place on {problem.ranks} ranks, and the exact "
                "program does not know about places; use the heuristic, or degrees that divide one another"
            )
    return plan
