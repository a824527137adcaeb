"""A lower bound on every plan of a step: any number of micro-batches, any sequences in each, any groups.

Let M micro-batches with work take C_1, ..., C_M seconds on N ranks, and let b be the least start-up of a group. Four
facts hold for every plan:

1. Area. A group of degree d in micro-batch m ends within C_m, so N (C_m - b) is at least the sum over its groups of d
   times their seconds after b. Ranks without a group only add to the left side.
2. Time. After its start-up b_k, a group of kind k takes at least each linear piece of its cost: the sum over its
   sequences of the piece (`KindCost.pieces`), because the largest piece of a sum is at most the sum of the largest.
3. Memory. The tokens of a group are at most its capacity. This stays true for dual feasible functions of the shares
   (`bound.FEASIBLE`), which count the room that long sequences leave and no other can use.
4. Ranks. The degrees of all groups sum to at most N M, and a kind has at most as many groups as M times its slots.

Sequences that may be divided among kinds turn these facts into a linear program, whose least C_1 + ... + C_M is a bound
for M micro-batches. The bound of a step is the smallest over M. As M starts cost M b, large M need no program. A single
micro-batch holds all sequences, so `bound.microbatch_bound` also bounds plans with M = 1.

The program is solved for classes of similar lengths, but its value is not used. Its dual prices are: `_Prices.value`
makes them feasible and lets every sequence pay, with its true length, at its cheapest kind. By weak duality, any prices
give a bound, so that neither classes nor the solver's tolerances can make it too high.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog  # type: ignore[import-untyped]
from scipy.sparse import coo_matrix  # type: ignore[import-untyped]

from megatron.longseq.flexsp.plan.bound import FEASIBLE, microbatch_bound, rounded
from megatron.longseq.flexsp.plan.cost import KindCost
from megatron.longseq.flexsp.plan.length_classes import length_classes
from megatron.longseq.flexsp.plan.problem import DegreeCost, StepProblem
from megatron.longseq.flexsp.plan.split import least_microbatches

Values = NDArray[np.float64]

_CLASSES = 120
_FEW = 24  # classes up to which more functions of the memory's shares are used
_PARTS = 32
_WASTE = 3.0  # the program leaves out kinds with more than that many times the least work of a sequence
_EPSILON = 1e-9


def step_bound(problem: StepProblem, least: int = 1, known: float = np.inf) -> float:
    """Return a lower bound on the seconds of every plan of a step; see the module.

    Args:
        problem: the step.
        least: smallest number of micro-batches. Those without sequences count with the fixed seconds.
        known: seconds of a known plan. Numbers of micro-batches that surely take longer are not examined closely.
    """
    if not problem.lengths:
        return 0.0
    bounds = CountBounds(problem)
    best, count = np.inf, least_microbatches(problem)
    while count <= len(problem.lengths):
        empty = max(0, least - count) * problem.cost.fixed
        if bounds.simple(count) + empty >= best:
            # With more micro-batches it grows, except that fewer of them are empty.
            if count >= least:
                break
        else:
            found = bounds.of(count) + empty
            if count == 1 and found < known < np.inf:  # its sequences are all sequences
                found = max(found, microbatch_bound(problem, range(len(problem.lengths)), known - empty) + empty)
            best = min(best, found)
        count += 1
    return float(min(best, known))


class CountBounds:
    """Lower bounds on plans with a given number of micro-batches with work.

    Args:
        problem: the step, with at least one sequence.
    """

    def __init__(self, problem: StepProblem) -> None:
        self.problem, self._program = problem, _Program(problem)
        self._longest = max(seconds for seconds, _ in problem.least)

    def simple(self, count: int) -> float:
        """Return a bound that needs no program: all work, or the longest sequence and the start-ups of the others."""
        startup = self.problem.startup
        return max(count * startup + self._program.area, self._longest + (count - 1) * startup)

    def of(self, count: int) -> float:
        """Return the bound of the linear program, or the simple one where that is larger."""
        return max(self.simple(count), self._program.bound(count))


@dataclass(frozen=True, slots=True)
class _KindNeeds:
    """What sequences need of a kind.

    Attributes:
        kind: the kind.
        shares: of a group's memory under every function, [function, sequence].
        pieces: seconds, [piece, sequence].
        fits: sequences that a group holds.
    """

    kind: KindCost
    shares: Values
    pieces: Values
    fits: NDArray[np.bool_]

    @staticmethod
    def of(
        each: DegreeCost, kind: KindCost, indices: Sequence[int], functions: Sequence[Callable[[Values], Values]]
    ) -> "_KindNeeds":
        tokens = np.array([each.tokens[index] for index in indices], dtype=np.float64)
        share = tokens / (each.capacity * (1 + _EPSILON))
        pieces = np.array([token * tokens + square * tokens**2 for token, square in kind.pieces()])
        return _KindNeeds(kind, np.array([function(share) for function in functions]), pieces, share <= 1)

    @property
    def degree(self) -> int:
        """Number of ranks."""
        return self.kind.kind.degree

    @property
    def work(self) -> Values:
        """Rank-seconds of each sequence; infinite where it does not fit."""
        return np.where(self.fits, self.degree * self.pieces.max(axis=0), np.inf)


@dataclass(frozen=True, slots=True)
class _Prices:
    """Dual prices: of a rank of a micro-batch, and per kind of memory, of time, and of its number of slots."""

    rank: float
    memory: list[Values]
    time: list[Values]
    slots: Values

    def value(self, problem: StepProblem, needs: Sequence[_KindNeeds], counts: Values, microbatches: int) -> float:
        """Return the bound that these prices give.

        The prices of a kind are first made to sum to what a group of it costs.
        """
        ranks, startup = problem.ranks, problem.startup
        rank = max(self.rank, 0.0)
        paid = np.full(len(counts), np.inf)
        total = microbatches * (startup - ranks * rank)
        for number, one in enumerate(needs):
            slots = max(float(self.slots[number]), 0.0)
            total -= microbatches * len(problem.placement.slots(one.degree)) * slots
            limit = one.degree * (rank + (one.kind.startup - startup) / ranks) + slots
            price = _spent(self.memory[number], one.shares, limit)
            price += _spent(self.time[number], one.pieces, one.degree / ranks)
            paid = np.minimum(paid, np.where(one.fits, price, np.inf))
        return float(total + paid @ counts)


def _spent(prices: Values, needs: Values, limit: float) -> Values:
    """Return what every sequence pays for its needs, [need, sequence], at prices whose sum is the limit.

    Too high prices are lowered in proportion. What is left of the limit is the price of the largest need.
    """
    prices = np.maximum(prices, 0.0)
    total = prices.sum()
    if total > limit:
        prices = prices * (limit / total)
    else:
        prices[np.argmax(needs.sum(axis=1))] += limit - total
    paid: Values = prices @ needs
    return paid


class _Program:
    """The linear program of a step, for any number of micro-batches."""

    def __init__(self, problem: StepProblem) -> None:
        self.problem = problem
        chosen, self.counts, _ = length_classes(problem, range(len(problem.lengths)), _CLASSES)
        every, self.every_count, _ = length_classes(problem, range(len(problem.lengths)), len(problem.lengths))
        parts = range(5, _PARTS + 1) if len(chosen) <= _FEW else ()
        functions = (*FEASIBLE, *(rounded(number) for number in parts))

        def needs(indices: Sequence[int]) -> list[_KindNeeds]:
            degrees = problem.by_degree.values()
            return [_KindNeeds.of(each, kind, indices, functions) for each in degrees for kind in each.kinds]

        self.needs, self.exact = needs(chosen), needs(every)
        least = np.min([one.work for one in self.exact], axis=0)
        self.area = float(least @ self.every_count) / problem.ranks
        work = np.array([one.work for one in self.needs])
        self.used = [np.flatnonzero(row <= _WASTE * work.min(axis=0)) for row in work]
        self._build()

    def _build(self) -> None:
        """Build the rows. Columns: a rank too many, groups and seconds of each kind, parts of classes in kinds."""
        problem, kinds = self.problem, len(self.needs)
        degrees = np.array([one.degree for one in self.needs], dtype=np.float64)
        rows, cols, data = [np.zeros(kinds + 1, np.int64)], [np.arange(kinds + 1)], [np.array([-1.0, *degrees])]
        height, width = 1, 1 + 2 * kinds
        entries = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for number, (one, used) in enumerate(zip(self.needs, self.used, strict=True)):
            own = np.arange(width, width + len(used))
            entries.append((used, own))
            for values, column in ((one.shares, 1 + number), (one.pieces, 1 + kinds + number)):
                lines = np.arange(height, height + len(values))
                rows += [np.repeat(lines, len(used)), lines]
                cols += [np.tile(own, len(lines)), np.full(len(lines), column)]
                data += [values[:, used].ravel(), np.full(len(lines), -1.0)]
                height += len(lines)
            width += len(used)
        self.limits = coo_matrix((np.concatenate(data), (np.concatenate(rows), np.concatenate(cols))), (height, width))
        classes, places = (np.concatenate(one) for one in zip(*entries, strict=True))
        self.whole = coo_matrix((np.ones(len(classes)), (classes, places)), shape=(len(self.counts), width))
        startups = np.array([one.kind.startup for one in self.needs]) - problem.startup
        # A rank too many costs what twice the work of the step costs, so that the program always has a solution.
        goal = [2 * self.area + problem.startup, *(degrees * startups / problem.ranks), *(degrees / problem.ranks)]
        self.goal = np.concatenate([np.array(goal), np.zeros(width - len(goal))])

    def bound(self, microbatches: int) -> float:
        """Return the bound for plans with that many micro-batches with work."""
        problem, kinds = self.problem, len(self.needs)
        upper = np.full(len(self.goal), np.inf)
        upper[1 : 1 + kinds] = [microbatches * len(problem.placement.slots(one.degree)) for one in self.needs]
        right = np.zeros(self.limits.shape[0])
        right[0] = problem.ranks * microbatches
        found = linprog(
            self.goal,
            A_ub=self.limits.tocsr(),
            b_ub=right,
            A_eq=self.whole.tocsr(),
            b_eq=self.counts,
            bounds=np.column_stack([np.zeros(len(upper)), upper]),
            method="highs",
        )
        if found.status != 0:
            return 0.0
        return self._prices(-found.ineqlin.marginals, -found.upper.marginals).value(
            problem, self.exact, self.every_count, microbatches
        )

    def _prices(self, prices: Values, slots: Values) -> _Prices:
        memory, time, at = [], [], 1
        for one in self.needs:
            middle, end = at + len(one.shares), at + len(one.shares) + len(one.pieces)
            memory.append(prices[at:middle])
            time.append(prices[middle:end])
            at = end
        return _Prices(float(prices[0]), memory, time, slots[1 : 1 + len(self.needs)])
