"""Which units of a model are gathered while one computes, and when their all-gathers and reduce-scatters start.

A forward pass uses the units of a model chunk in order, and a backward pass in reverse order. While one unit computes,
a rank keeps it and the units that are used next, up to a depth. So the last units stay gathered if a backward follows
a forward, and the first ones if a forward follows a backward. `PassHistory` says which pass follows: a pipeline
repeats the order of passes in every step.

Where attention communicates (context parallelism), a collective of weights that is in flight at that time delays it. So
all-gathers start at the point of a layer that is followed by the longest computation without attention (selective
overlap, InternEvo, arXiv 2401.09149). Reduce-scatters start at the end of a layer's backward, which is such a point.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class Direction(StrEnum):
    """The pass in which a unit is used."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Point(StrEnum):
    """When a collective starts, within the use of a unit."""

    START = "start"
    AFTER_ATTENTION = "after attention"
    END = "end"


class CollectiveLaunch(NamedTuple):
    """The start of a unit's collectives.

    Attributes:
        kind: "gather" its parameters or "reduce" its gradients.
        unit: whose.
        during: unit that computes at that time.
        direction: of that computation.
        point: within that computation.
    """

    kind: str
    unit: int
    during: int
    direction: Direction
    point: Point


class PassHistory:
    """The passes of a model chunk in this step, and the direction of the one that follows.

    As long as the passes are those of the step before, so is the one that follows. Otherwise a backward is expected
    after a forward, and a forward after a backward.
    """

    def __init__(self) -> None:
        self._passes: list[Direction] = []
        self._before: list[Direction] = []
        self._is_repeated = False

    def begin_step(self) -> None:
        """Note that a step begins."""
        self._before, self._passes = self._passes, []
        self._is_repeated = bool(self._before)

    def begin_pass(self, direction: Direction) -> None:
        """Note that a pass begins."""
        place = len(self._passes)
        self._is_repeated = self._is_repeated and self._before[place : place + 1] == [direction]
        self._passes.append(direction)

    @property
    def following(self) -> Direction | None:
        """The direction of the pass after the current one; None: the step ends with the current one."""
        if self._is_repeated:
            return next(iter(self._before[len(self._passes) : len(self._passes) + 1]), None)
        return Direction.FORWARD if self._passes[-1:] == [Direction.BACKWARD] else Direction.BACKWARD


def window(
    unit: int, direction: Direction, has_backward: Sequence[bool], depth: int, following: Direction | None
) -> tuple[int, ...]:
    """Return the units that are gathered while one computes: it and the next `depth` others, in the order of use.

    Args:
        unit: index of the unit that computes, in forward order.
        direction: of the pass.
        has_backward: whether the backward reads the parameters of each unit.
        depth: number of other units.
        following: direction of the pass that is expected to follow; None: none is.
    """
    forward = list(range(len(has_backward)))
    backward = [other for other in reversed(forward) if has_backward[other]]
    rest = forward[unit:] if direction is Direction.FORWARD else [other for other in backward if other <= unit]
    upcoming = {Direction.FORWARD: forward, Direction.BACKWARD: backward, None: []}[following]
    return tuple(dict.fromkeys([unit, *rest, *upcoming]))[: depth + 1]


def gather_count(units: int, depth: int, passes: int, turns: int) -> int:
    """Return how many all-gathers of units a step starts; every unit is used in forward and backward passes.

    At a turn from forward to backward or back, `depth` + 1 units stay gathered. Without selective overlap (a depth of
    0), none does.

    Args:
        units: number of units of a model chunk.
        depth: see `window`.
        passes: forward and backward passes of the step.
        turns: how many of them follow one in the other direction.
    """
    kept = min(depth + 1, units) if depth else 0
    return units if kept == units else units * passes - kept * turns


def launch_point(direction: Direction, depth: int, before: float, after: float) -> Point:
    """Return the point of a layer at which all-gathers have the longest computation without attention before them.

    With a depth of 1, the gathered unit is needed when the layer ends. With a larger one, the computation of the next
    layer up to its attention counts too.

    Args:
        direction: of the pass.
        depth: see `window`.
        before: work of the layer that its forward does before attention (queries, keys and values), in any unit.
        after: work that its forward does after attention (the output projection and the MLP), in the same unit.
    """
    if direction is Direction.BACKWARD:
        before, after = after, before
    following = before if depth > 1 else 0.0
    return Point.AFTER_ATTENTION if after + following > before else Point.START


def launches(
    has_backward: Sequence[bool], points: Sequence[tuple[Point, Point]], depth: int, passes: Sequence[Direction]
) -> list[CollectiveLaunch]:
    """Return all launches of a step, in order; at first nothing is gathered.

    Args:
        has_backward: whether each unit's backward reads its parameters; every unit has gradients.
        points: where a unit's use starts all-gathers of others, in forward and in backward.
        depth: see `window`.
        passes: of the step, in order.
    """
    found: list[CollectiveLaunch] = []
    gathered: set[int] = set()

    def use(unit: int, direction: Direction, following: Direction | None) -> None:
        if direction is Direction.FORWARD or has_backward[unit]:
            whole = window(unit, direction, has_backward, depth, following)
            gathered.intersection_update(whole)
            point = points[unit][direction is Direction.BACKWARD]
            for other in whole:
                if other not in gathered:
                    at = Point.START if other == unit else point
                    found.append(CollectiveLaunch("gather", other, unit, direction, at))
                    gathered.add(other)
        if direction is Direction.BACKWARD:
            found.append(CollectiveLaunch("reduce", unit, unit, direction, Point.END))

    units = range(len(has_backward))
    for direction, following in zip(passes, [*passes[1:], None], strict=True):
        for unit in units if direction is Direction.FORWARD else reversed(units):
            use(unit, direction, following)
    return found
