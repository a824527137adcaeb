"""Which units of a model are gathered while one computes, and when their all-gathers and reduce-scatters start.

A micro-batch uses the units of a model chunk in order in its forward, and in reverse order in its backward. While one
unit computes, a rank keeps it and the units that are used next, up to a depth. So the last units stay gathered from
forward to backward, and the first ones from a backward to the next forward.

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


def window(
    unit: int, direction: Direction, has_backward: Sequence[bool], depth: int, *, turns: bool
) -> tuple[int, ...]:
    """Return the units that are gathered while one computes: it and the next `depth` others, in the order of use.

    Args:
        unit: index of the unit that computes, in forward order.
        direction: of the pass.
        has_backward: whether the backward reads the parameters of each unit.
        depth: number of other units.
        turns: whether a pass in the other direction is expected to follow this one.
    """
    forward = range(len(has_backward))
    backward = [other for other in reversed(forward) if has_backward[other]]
    if direction is Direction.FORWARD:
        upcoming = [*forward[unit:], *(backward if turns else ())]
    else:
        upcoming = [*(other for other in backward if other <= unit), *(forward if turns else ())]
    return tuple(dict.fromkeys([unit, *upcoming]))[: depth + 1]


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
    has_backward: Sequence[bool], points: Sequence[tuple[Point, Point]], depth: int, microbatches: int
) -> list[CollectiveLaunch]:
    """Return all launches of a step with one micro-batch after the other, in order; at first nothing is gathered.

    Args:
        has_backward: whether each unit's backward reads its parameters; every unit has gradients.
        points: where a unit's use starts all-gathers of others, in forward and in backward.
        depth: see `window`.
        microbatches: forward and backward passes of the step.
    """
    found: list[CollectiveLaunch] = []
    gathered: set[int] = set()

    def use(unit: int, direction: Direction, *, turns: bool) -> None:
        if direction is Direction.FORWARD or has_backward[unit]:
            held = window(unit, direction, has_backward, depth, turns=turns)
            gathered.intersection_update(held)
            point = points[unit][direction is Direction.BACKWARD]
            for other in held:
                if other not in gathered:
                    at = Point.START if other == unit else point
                    found.append(CollectiveLaunch("gather", other, unit, direction, at))
                    gathered.add(other)
        if direction is Direction.BACKWARD:
            found.append(CollectiveLaunch("reduce", unit, unit, direction, Point.END))

    units = range(len(has_backward))
    for microbatch in range(microbatches):
        for unit in units:
            use(unit, Direction.FORWARD, turns=True)
        for unit in reversed(units):
            use(unit, Direction.BACKWARD, turns=microbatch < microbatches - 1)
    return found
