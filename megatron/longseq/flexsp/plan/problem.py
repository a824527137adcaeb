"""The planning problem of a step: lengths, ranks, and what a group of each degree costs.

The kind of a group is chosen last: a group of a degree takes as long as its fastest kind on its sequences.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.flexsp.plan.cost import FAMILIES, GroupCostModel, KindCost, KindFamily
from megatron.longseq.flexsp.plan.placement import DegreeCounts, Placement
from megatron.longseq.flexsp.plan.plan import Kind, Microbatch, SequenceGroup

Values = NDArray[np.float64]
Seconds = Callable[[float, float], float]  # of a number of tokens and a sum of squared lengths

_LENGTHS, _LOADS = 33, 9  # mean lengths, and tokens of a group, with which kinds are compared


@dataclass(frozen=True, slots=True)
class DegreeCost:
    """What a group of a degree costs.

    Attributes:
        degree: number of ranks.
        capacity: most tokens.
        kinds: kinds that are the fastest for some sequences.
        tokens: tokens of every sequence of the step in a group of this degree.
    """

    degree: int
    capacity: int
    kinds: tuple[KindCost, ...]
    tokens: Sequence[int]

    def fastest(self, tokens: float, squares: float) -> Kind:
        """Return the kind that takes the least time; of equally fast ones the first.

        Args:
            tokens: sum of the sequences' tokens, S.
            squares: sum of their squares, Q.
        """
        return min(self.kinds, key=lambda one: one.seconds(tokens, squares)).kind

    def seconds(self) -> Seconds:
        """Return the function of (tokens, squares) that gives the seconds of the fastest of the likely kinds."""
        likely = self.likely()
        if len(likely) == 1 and not likely[0].rings:
            startup, token, square = likely[0].startup, likely[0].token, likely[0].square
            return lambda tokens, squares: startup + token * tokens + square * squares
        rows = [(one.startup, one.token, one.square, *_two_rings(one)) for one in likely]

        def seconds(tokens: float, squares: float) -> float:
            best = float("inf")
            for startup, token, square, sent, hidden, sent_back, hidden_back in rows:
                time = startup + token * tokens + square * squares
                if time >= best:
                    continue
                exposed, exposed_back = sent * tokens - hidden * squares, sent_back * tokens - hidden_back * squares
                if exposed > 0:
                    time += exposed
                if exposed_back > 0:
                    time += exposed_back
                best = min(best, time)
            return best

        return seconds

    def alone(self) -> Values:
        """Return the seconds of every sequence as the only one of a group; infinite where it does not fit."""
        tokens = np.array(self.tokens, dtype=np.float64)
        return self.of_groups(tokens, tokens**2)

    def of_groups(self, tokens: Values, squares: Values) -> Values:
        """Return the seconds of groups; infinite where their sequences do not fit.

        Args:
            tokens: sum of the tokens of each group.
            squares: sum of their squares.
        """
        found = np.min([_seconds(one, tokens, squares) for one in self.kinds], axis=0)
        return np.where(tokens <= self.capacity, found, np.inf)

    def likely(self) -> list[KindCost]:
        """Return the kinds that are the fastest for some tokens and mean lengths of the step."""
        tokens = np.array(self.tokens, dtype=np.float64)
        fitting = tokens[tokens <= self.capacity]
        if len(self.kinds) == 1 or not len(fitting):
            return list(self.kinds)
        lengths = np.geomspace(fitting.min(), fitting.max(), _LENGTHS)
        loads = np.geomspace(fitting.min(), self.capacity, _LOADS)[:, None]
        fastest = np.argmin([_seconds(one, loads, loads * lengths) for one in self.kinds], axis=0)
        return [self.kinds[number] for number in sorted(set(fastest.ravel().tolist()))]


def _two_rings(kind: KindCost) -> tuple[float, float, float, float]:
    (sent, hidden), (sent_back, hidden_back) = kind.rings or ((0.0, 0.0), (0.0, 0.0))
    return sent, hidden, sent_back, hidden_back


def _seconds(kind: KindCost, tokens: Values, squares: Values) -> Values:
    """Return `KindCost.seconds` of arrays."""
    seconds = kind.startup + kind.token * tokens + kind.square * squares
    for sent, hidden in kind.rings:
        seconds = seconds + np.maximum(sent * tokens - hidden * squares, 0.0)
    return seconds


class PlanError(ValueError):
    """No plan exists for the sequences."""


class StepProblem:
    """A step's sequences, the ranks that work on them, and what they cost.

    Args:
        lengths: tokens of every sequence.
        ranks: number of data- and context-parallel ranks N.
        cost: cost model.
        degrees: degrees that a group may have; those above N, or without a legal kind, are left out.
        families: kinds that a group may have.

    Raises:
        PlanError: A sequence fits into no group.
        ValueError: A length or the number of ranks is below 1, or no degree is left.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        ranks: int,
        cost: GroupCostModel,
        degrees: Iterable[int],
        families: Iterable[KindFamily] = FAMILIES,
    ) -> None:
        if ranks < 1:
            raise ValueError(f"{ranks} ranks: give at least 1")
        wrong = next((index for index, length in enumerate(lengths) if length < 1), None)
        if wrong is not None:
            raise ValueError(f"sequence {wrong} has {lengths[wrong]} tokens: every sequence needs at least 1")
        self.lengths, self.ranks, self.cost = tuple(lengths), ranks, cost
        self.placement = Placement(ranks, cost.links.node)
        families, degrees = tuple(families), sorted(set(degrees))
        self.by_degree = {}
        for degree in degrees:
            if 1 <= degree <= ranks and self.placement.slots(degree):
                kinds = undominated([cost.of_kind(kind) for kind in cost.kinds(degree, families)])
                if kinds:
                    tokens = [cost.tokens(degree, length) for length in lengths]
                    self.by_degree[degree] = DegreeCost(degree, cost.capacity(degree), kinds, tokens)
        if not self.by_degree:
            raise ValueError(
                f"degrees {degrees} with kinds {', '.join(families)}: none of them can be used on {ranks} ranks with "
                f"{cost.heads.query} heads; give degrees from 1 to {ranks}, and ring for those that do not divide the "
                "heads"
            )
        self.degrees = tuple(self.by_degree)
        self._check_fit()
        self.time = {degree: one.seconds() for degree, one in self.by_degree.items()}

    def _check_fit(self) -> None:
        for index, length in enumerate(self.lengths):
            if not any(one.tokens[index] <= one.capacity for one in self.by_degree.values()):
                largest = self.by_degree[self.degrees[-1]]
                raise PlanError(
                    f"sequence {index} has {length} tokens, but the largest group, of {largest.degree} of {self.ranks} "
                    f"ranks, holds {largest.capacity} ({self.cost.tokens_per_rank} tokens per rank): no plan exists. "
                    "Give more ranks, a larger degree or more tokens per rank, or split or drop the sequence"
                )

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Indices of the sequences, longest first."""
        return tuple(sorted(range(len(self.lengths)), key=lambda index: (-self.lengths[index], index)))

    @cached_property
    def least_tokens(self) -> tuple[int, ...]:
        """Tokens of every sequence in the group that pads it least, among those that hold it."""
        each = self.by_degree.values()
        return tuple(
            min(one.tokens[index] for one in each if one.tokens[index] <= one.capacity)
            for index in range(len(self.lengths))
        )

    @cached_property
    def least(self) -> tuple[tuple[float, float], ...]:
        """Of every sequence, the seconds on the fastest group, and the rank-seconds on the one with the least work.

        The second number has no start-up in it.
        """
        works = []
        for degree, each in self.by_degree.items():
            tokens = np.array(each.tokens, dtype=np.float64)
            work = degree * np.min([one.token * tokens + one.square * tokens**2 for one in each.kinds], axis=0)
            works.append(np.where(tokens <= each.capacity, work, np.inf))
        alone, least = np.min(list(self.alone.values()), axis=0), np.min(works, axis=0)
        return tuple(zip(alone.tolist(), least.tolist(), strict=True))

    @cached_property
    def least_added(self) -> dict[int, list[float]]:
        """Of each degree, seconds that every sequence surely adds to a group with or without others.

        A group takes as long as the largest linear piece of its fastest kind (`KindCost.pieces`), and grows by at least
        that piece.
        """
        found = {}
        for degree, each in self.by_degree.items():
            tokens = np.array(each.tokens, dtype=np.float64)
            pieces = {piece for one in each.kinds for piece in one.pieces()}
            added = np.min([token * tokens + square * tokens**2 for token, square in pieces], axis=0)
            found[degree] = (added * (1 - 1e-9)).tolist()
        return found

    @cached_property
    def least_work(self) -> dict[int, Values]:
        """Of each degree, rank-seconds that every sequence surely adds; infinite where it does not fit."""
        return {
            degree: np.where(np.isfinite(self.alone[degree]), np.array(added) * degree, np.inf)
            for degree, added in self.least_added.items()
        }

    @cached_property
    def alone(self) -> dict[int, Values]:
        """Seconds of every sequence as the only one of a group of each degree."""
        return {degree: each.alone() for degree, each in self.by_degree.items()}

    @cached_property
    def startup(self) -> float:
        """Least seconds of a group that do not depend on its sequences."""
        return min(one.startup for each in self.by_degree.values() for one in each.kinds)

    def microbatch(self, groups: Iterable[tuple[int, Sequence[int]]]) -> Microbatch:
        """Return a micro-batch of groups on their ranks; ranks that are left over form groups without sequences.

        These have the smallest degrees that may be used. Ranks on which none of them has a place wait alone, each in a
        group of its own (see `Microbatch.idle_ranks`).

        Args:
            groups: degree and sequences of every group; those without sequences are left out.

        Raises:
            PlanError: The groups have no placement.
        """
        used = sorted(((degree, sorted(held)) for degree, held in groups if held), key=lambda one: (-one[0], one[1]))
        counts = count_degrees(degree for degree, _ in used)
        starts = self.placement.place(counts)
        if starts is None:
            raise PlanError(f"groups of degrees {counts} have no placement on {self.ranks} ranks")
        free = self.placement.free(counts)
        placed = self._idle_groups({rank for rank in range(self.ranks) if free[rank]})
        for (degree, held), start in zip(used, starts, strict=True):
            tokens = [self.by_degree[degree].tokens[index] for index in held]
            kind = self.by_degree[degree].fastest(sum(tokens), sum(one * one for one in tokens))
            seconds = self.cost.seconds(kind, [self.lengths[index] for index in held])
            placed.append(SequenceGroup(kind, tuple(range(start, start + degree)), tuple(held), seconds))
        placed.sort(key=lambda group: group.ranks)
        return Microbatch(tuple(placed), max((group.seconds for group in placed), default=0.0) or self.cost.fixed)

    def _idle_groups(self, free: set[int]) -> list[SequenceGroup]:
        """Return groups without sequences on free ranks."""
        groups = []
        for degree, one in self.by_degree.items():
            for start in self.placement.slots(degree):
                ranks = range(start, start + degree)
                if free.issuperset(ranks):
                    groups.append(SequenceGroup(one.kinds[0].kind, tuple(ranks), (), 0.0))
                    free.difference_update(ranks)
        return groups + [SequenceGroup(Kind(1, 1), (rank,), (), 0.0) for rank in sorted(free)]


def count_degrees(degrees: Iterable[int]) -> DegreeCounts:
    """Return how many groups have each degree, by descending degree."""
    counts: dict[int, int] = {}
    for degree in degrees:
        counts[degree] = counts.get(degree, 0) + 1
    return tuple(sorted(counts.items(), reverse=True))


def undominated(kinds: Sequence[KindCost]) -> tuple[KindCost, ...]:
    """Return the kinds that are faster than each of the others for some sequences."""
    left = list(kinds)
    for one in kinds:
        if any(_dominates(other, one) for other in left if other is not one):
            left.remove(one)
    return tuple(left)


def _dominates(a: KindCost, b: KindCost) -> bool:
    """Return whether a takes at most as long as b for any sequences.

    Without start-up, times per token are convex and piecewise linear in squares per token, with corners where a ring's
    messages begin to be hidden. Below and above all corners they are straight.
    """
    corners = [sent / hidden for one in (a, b) for sent, hidden in one.rings if hidden > 0]
    tests = [0.0, *corners, *(2 * max(corners, default=1.0) * factor for factor in (1.0, 2.0))]
    slopes = [one.seconds(0.0, 1.0) - one.startup for one in (a, b)]
    return (
        a.startup <= b.startup
        and slopes[0] <= slopes[1]
        and all(a.seconds(1.0, x) - a.startup <= b.seconds(1.0, x) - b.startup for x in tests)
    )
