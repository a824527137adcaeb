"""The fastest plan of a few sequences, by dynamic programming over their subsets.

`_Table.seconds[S, R]` is the least time in which a micro-batch can finish the subset S with the resources R. The group
that holds the first sequence of S is chosen among all of its subsets, and the others are left for the rest of R. A step
then is a sequence of micro-batches, found in the same way. Sequences of one length are alike, so a subset is a number
of sequences of each length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.flexsp.plan.assign import WorkGroup
from megatron.longseq.flexsp.plan.placement import DegreeCounts
from megatron.longseq.flexsp.plan.problem import StepProblem, count_degrees

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]

_MOST_STEPS = 2_000_000_000  # of the program: pairs of a subset and a part of it, times resources, times degrees
_MOST_SUBSETS = 70_000
_MOST_RESOURCES = 2_000


def solve_by_subsets(problem: StepProblem, idle: Callable[[int], float]) -> list[list[WorkGroup]] | None:
    """Return the fastest plan of a step; None where the program would take too long.

    Args:
        problem: the step.
        idle: seconds that are added to a plan with that many micro-batches.
    """
    lengths = sorted(set(problem.lengths), reverse=True)
    members = [[index for index in problem.order if problem.lengths[index] == length] for length in lengths]
    counts = [len(one) for one in members]
    if prod(count + 1 for count in counts) > _MOST_SUBSETS:
        return None
    pairs = prod((count + 1) * (count + 2) // 2 for count in counts)
    for resources in _resources(problem):
        if pairs * len(resources.degrees) * resources.size <= _MOST_STEPS:
            plan = _Table(problem, members, resources).plan(idle)
            degrees = (count_degrees(group.degree for group in groups) for groups in plan)
            if all(problem.placement.fits(one) for one in degrees):
                return plan
    return None


@dataclass(frozen=True, slots=True)
class _Resources:
    """What the groups of a micro-batch may use.

    Attributes:
        degrees: degrees of groups.
        after: of each degree, the resources that are left after one group; -1 where there is no room for it.
        whole: resources of an empty micro-batch, of which one is used.
    """

    degrees: tuple[int, ...]
    after: dict[int, Numbers]
    whole: Numbers

    @property
    def size(self) -> int:
        """Number of different resources."""
        return len(next(iter(self.after.values())))


def _resources(problem: StepProblem) -> Iterator[_Resources]:
    """Yield the ranks that are left, and then the sets of groups that are left of a set that has a place.

    Some groups of a plan on enough ranks may have no place, where degrees do not divide one another. Otherwise it is
    the fastest one with places, too.
    """
    degrees, ranks = problem.degrees, np.arange(problem.ranks + 1)
    yield _Resources(degrees, {one: np.where(ranks >= one, ranks - one, -1) for one in degrees}, ranks[-1:])
    sets = _sets_of_groups(problem)
    if sets is not None:
        number = {counts: at for at, counts in enumerate(sets)}
        after = {one: np.array([number.get(_without(counts, one), -1) for counts in sets]) for one in degrees}
        yield _Resources(degrees, after, np.flatnonzero([problem.placement.fits(counts) for counts in sets]))


def _sets_of_groups(problem: StepProblem) -> list[DegreeCounts] | None:
    """Return the degrees of all sets of groups for which ranks and slots suffice; None where there are too many."""
    found: set[DegreeCounts] = {()}
    layer: set[DegreeCounts] = {()}
    for _ in range(len(problem.lengths)):
        larger = {_with(counts, degree) for counts in layer for degree in problem.degrees}
        layer = {counts for counts in larger if _may_fit(problem, counts)}
        found |= layer
        if len(found) > _MOST_RESOURCES:
            return None
    return sorted(found)


def _may_fit(problem: StepProblem, counts: DegreeCounts) -> bool:
    slots = all(count <= len(problem.placement.slots(degree)) for degree, count in counts)
    return slots and sum(degree * count for degree, count in counts) <= problem.ranks


def _with(counts: DegreeCounts, degree: int, change: int = 1) -> DegreeCounts:
    left = dict(counts)
    left[degree] = left.get(degree, 0) + change
    return tuple((one, count) for one, count in sorted(left.items(), reverse=True) if count)


def _without(counts: DegreeCounts, degree: int) -> DegreeCounts:
    return _with(counts, degree, -1)  # a negative count is in no set


class _Table:
    """The least seconds of all subsets in one micro-batch.

    A subset is the number of its sequences of each length, written as the digits of one number. So a subset without a
    part of it is the difference of their numbers.

    Args:
        problem: the step.
        members: sequences of each length.
        resources: of a micro-batch.
    """

    def __init__(self, problem: StepProblem, members: Sequence[Sequence[int]], resources: _Resources) -> None:
        self.problem, self.members, self.resources = problem, members, resources
        sizes = [len(one) + 1 for one in members]
        self.strides = [prod(sizes[:at]) for at in range(len(sizes))]
        self.count = prod(sizes)
        every = np.arange(self.count)
        self.digits = np.array([every // stride % size for stride, size in zip(self.strides, sizes, strict=True)])
        self.alone = {degree: self._alone(degree) for degree in resources.degrees}
        self.seconds = self._seconds()

    def _alone(self, degree: int) -> Values:
        """Return the seconds of every subset in one group of a degree; infinite where it does not fit."""
        one = self.problem.by_degree[degree]
        length = np.array([[float(one.tokens[each[0]])] for each in self.members])
        # Not a matrix product, whose rounding may differ between machines.
        return one.of_groups((length * self.digits).sum(axis=0), (length**2 * self.digits).sum(axis=0))

    def parts(self, whole: int) -> Numbers:
        """Return the parts of a subset that hold one of its longest sequences."""
        found, is_first = np.zeros(1, np.int64), True
        for stride, digit in zip(self.strides, self.digits[:, whole].tolist(), strict=True):
            if digit:
                found = (found[:, None] + np.arange(int(is_first), digit + 1) * stride).ravel()
                is_first = False
        return found

    def _seconds(self) -> Values:
        """Return the least seconds, [subset, resources]."""
        found = np.full((self.count, self.resources.size), np.inf)
        found[0] = 0.0
        for whole in range(1, self.count):
            parts = self.parts(whole)
            rests = whole - parts
            for degree, after in self.resources.after.items():
                alone = self.alone[degree][parts]
                fitting = np.flatnonzero(alone < np.inf)
                room = np.flatnonzero(after >= 0)
                if len(fitting) and len(room):
                    rest = found[rests[fitting][:, None], after[room]]
                    ends = np.maximum(alone[fitting][:, None], rest).min(axis=0)
                    found[whole, room] = np.minimum(found[whole, room], ends)
        return found

    @cached_property
    def microbatch(self) -> Values:
        """Least seconds of every subset in a micro-batch."""
        least: Values = self.seconds[:, self.resources.whole].min(axis=1)
        return least

    def plan(self, idle: Callable[[int], float]) -> list[list[WorkGroup]]:
        """Return the fastest plan; `idle` as for `solve_by_subsets`."""
        most = len(self.problem.lengths)
        steps = np.full((most + 1, self.count), np.inf)  # least seconds of a number of micro-batches
        steps[0, 0] = 0.0
        for whole in range(1, self.count):
            parts = self.parts(whole)
            steps[1:, whole] = (self.microbatch[parts] + steps[:-1, whole - parts]).min(axis=1)
        count = min(range(1, most + 1), key=lambda number: steps[number, -1] + idle(number))
        left, whole, plan = [list(one) for one in self.members], self.count - 1, []
        while count:
            parts = self.parts(whole)
            part = int(parts[np.argmin(self.microbatch[parts] + steps[count - 1, whole - parts])])
            plan.append(self._groups(part, left))
            whole, count = whole - part, count - 1
        return plan

    def _groups(self, whole: int, left: list[list[int]]) -> list[WorkGroup]:
        """Return the groups of a micro-batch, whose sequences are taken out of those that are left."""
        at = int(self.resources.whole[np.argmin(self.seconds[whole, self.resources.whole])])
        groups = []
        while whole:
            parts = self.parts(whole)
            ends = {
                degree: np.maximum(self.alone[degree][parts], self.seconds[whole - parts, after[at]])
                for degree, after in self.resources.after.items()
                if after[at] >= 0
            }
            degree = min(ends, key=lambda one: float(ends[one].min()))
            part = int(parts[np.argmin(ends[degree])])
            group = WorkGroup(degree)
            for same, digit in zip(left, self.digits[:, part].tolist(), strict=True):
                for _ in range(digit):
                    group.add(self.problem, same.pop())
            groups.append(group)
            whole, at = whole - part, int(self.resources.after[degree][at])
        return groups
