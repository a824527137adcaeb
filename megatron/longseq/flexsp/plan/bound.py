"""A lower bound on every way to group the sequences of given micro-batches.

It asks how many ranks a micro-batch needs to end within a target time. Of groups of each kind, the
sequences use shares of time and of memory, and the shares in one group are at most 1 together. This stays true for dual
feasible functions of the shares (Fekete and Schepers, 2001), which count the room that a long sequence leaves and no
other can use. A program with a whole number of groups of each kind, but divisible sequences, gives the fewest ranks;
where it needs more than there are, the micro-batch takes longer than the target.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import coo_matrix  # type: ignore[import-untyped]

from megatron.longseq.flexsp.plan.cost import KindCost
from megatron.longseq.flexsp.plan.degree_sets import lower_estimate
from megatron.longseq.flexsp.plan.plan import StepPlan
from megatron.longseq.flexsp.plan.problem import DegreeCost, StepProblem

Values = NDArray[np.float64]

_CLOSE = 5e-4  # relative width at which the bisection ends
_NODES = 200  # of the branch and bound for the whole numbers of groups
_EPSILON = 1e-9  # limits are taken as larger by that
_LENGTHS = 400  # different lengths that are told apart; of more, neighbours count as the shortest of them


def microbatch_bounds(problem: StepProblem, plan: StepPlan) -> float:
    """Return a lower bound on the seconds of any groups for the sequences of the plan's micro-batches.

    Args:
        problem: the step.
        plan: a plan of it; micro-batches without sequences count with their seconds.
    """
    total = 0.0
    for one in plan.microbatches:
        indices = [index for group in one.groups for index in group.sequences]
        total += microbatch_bound(problem, indices, one.seconds) if indices else one.seconds
    return total


def microbatch_bound(problem: StepProblem, indices: Sequence[int], seconds: float) -> float:
    """Return a lower bound on the seconds of a micro-batch with these sequences.

    Args:
        problem: the step.
        indices: sequences.
        seconds: those of known groups, at which the search ends.
    """
    low, high = lower_estimate(problem, indices), seconds
    chosen, counts = _distinct(problem, indices)
    classes = [_KindShares(each, kind, chosen) for each in problem.by_degree.values() for kind in each.kinds]
    while high - low > _CLOSE * low:
        middle = (low + high) / 2
        if _needs_more(problem, classes, counts, middle):
            low = middle
        else:
            high = middle
    return low


def _distinct(problem: StepProblem, indices: Sequence[int]) -> tuple[list[int], Values]:
    """Return sequences of different lengths and the number of each; of too many, neighbours count as the shortest."""
    order = sorted(indices, key=lambda index: problem.lengths[index])
    lengths = sorted({problem.lengths[index] for index in indices})
    merged = max(1, -(-len(lengths) // _LENGTHS))
    cluster = {length: number // merged for number, length in enumerate(lengths)}
    found: dict[int, list[int]] = {}
    for index in order:
        found.setdefault(cluster[problem.lengths[index]], []).append(index)
    return [equal[0] for equal in found.values()], np.array([len(equal) for equal in found.values()], dtype=np.float64)


def _clipped(epsilon: float) -> Callable[[Values], Values]:
    """Return the function that drops shares below `epsilon` and completes those above 1 - `epsilon`."""
    return lambda x: np.where(x > 1 - epsilon, 1.0, np.where(x < epsilon, 0.0, x))


def rounded(parts: int) -> Callable[[Values], Values]:
    """Return the function that rounds shares down to the multiples of 1 / `parts` of which a group holds that many."""

    def function(x: Values) -> Values:
        scaled = (parts + 1) * x
        is_whole = np.abs(scaled - np.round(scaled)) < 1e-7
        return np.where(is_whole, np.minimum(x, np.floor(scaled + 0.5) / (parts + 1)), np.floor(scaled) / parts)

    return function


FEASIBLE: tuple[Callable[[Values], Values], ...] = (
    lambda x: x,
    _clipped(0.25),
    _clipped(1 / 3),
    *(rounded(parts) for parts in (1, 2, 3, 4)),
)


class _KindShares:
    """What share of a group of one kind each sequence needs."""

    def __init__(self, each: DegreeCost, kind: KindCost, indices: Sequence[int]) -> None:
        self.degree, self.startup = each.degree, kind.startup
        tokens = np.array([each.tokens[index] for index in indices], dtype=np.float64)
        self._memory = tokens / (each.capacity * (1 + _EPSILON))
        self._pieces = [token * tokens + square * tokens**2 for token, square in kind.pieces()]

    def rows(self, seconds: float) -> tuple[Values, NDArray[np.int64]]:
        """Return the shares under every function, [function, sequence], and which sequences fit.

        Args:
            seconds: within which a group has to end.
        """
        left = max(seconds - self.startup, 1e-12) * (1 + _EPSILON)
        parts = [self._memory, *(piece / left for piece in self._pieces)]
        fits = np.all([part <= 1 for part in parts], axis=0)
        shares = np.array([function(part) for part in parts for function in FEASIBLE])
        return shares, np.flatnonzero(fits).astype(np.int64)


def _needs_more(problem: StepProblem, classes: Sequence[_KindShares], counts: Values, seconds: float) -> bool:
    """Return whether sequences surely need more ranks than there are, to end within some seconds."""
    rows: list[NDArray[np.int64]] = []
    cols: list[NDArray[np.int64]] = []
    data: list[Values] = []
    width, height = len(classes), len(counts)  # numbers of groups first; every sequence is divided once
    for number, one in enumerate(classes):
        shares, fits = one.rows(seconds)
        size = len(fits)
        own = np.arange(width, width + size)
        rows.append(fits)  # its part of each sequence
        cols.append(own)
        data.append(np.ones(size))
        lines = np.arange(height, height + len(shares))
        rows += [np.repeat(lines, size), lines]
        cols += [np.tile(own, len(shares)), np.full(len(shares), number)]
        data += [shares[:, fits].ravel(), np.full(len(shares), -1.0)]
        width, height = width + size, height + len(shares)
    matrix = coo_matrix((np.concatenate(data), (np.concatenate(rows), np.concatenate(cols))), shape=(height, width))
    lower, upper = np.full(height, -np.inf), np.zeros(height)
    lower[: len(counts)] = upper[: len(counts)] = counts
    goal, whole, most = np.zeros(width), np.zeros(width), np.full(width, np.inf)
    goal[: len(classes)] = [one.degree for one in classes]
    whole[: len(classes)] = 1
    most[: len(classes)] = [len(problem.placement.slots(one.degree)) for one in classes]
    found = milp(
        goal,
        integrality=whole,
        bounds=Bounds(0, most),
        constraints=LinearConstraint(matrix.tocsr(), lower, upper),
        options={"node_limit": _NODES, "mip_rel_gap": 1e-3},
    )
    if found.status == 2:  # infeasible
        return True
    return found.mip_dual_bound is not None and bool(found.mip_dual_bound > problem.ranks * (1 + 1e-6))
