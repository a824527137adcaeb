"""Gather sharded parameters ahead, between the communication of attention (`--paro-selective-overlap`).

`gather_window` says which units are gathered while one computes, and at which point of a layer gathers start. Here
hooks on the layers' attention find that point in forward and in backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron.longseq.sharding.plan.gather_window import Direction, PassHistory, Point, launch_point, window
from megatron.longseq.sharding.runtime.unit_hooks import GatherHooks, State, Unit, in_backward, tensors_with_grad

ATTENTION = "core_attention"  # the last part of the name of upstream's modules that communicate
BEFORE_ATTENTION = ("linear_q", "linear_kv")  # prefixes of the linears that compute queries, keys and values


class SelectiveGatherHooks(GatherHooks):
    """Keeps a window of units gathered, and starts gathers where they delay no attention.

    Args:
        units: see `GatherHooks`.
        depth: number of units that are gathered besides the one that computes.
        communicates: whether attention communicates (context parallelism). Otherwise gathers start with a unit.
        is_last: returns whether this micro-batch is the last one of the step, so that its backward is followed by no
            forward with the same parameters.

    Attributes:
        points: of each unit that contains attention which communicates, where it starts gathers of other units.
    """

    def __init__(self, units: Sequence[Unit], depth: int, *, communicates: bool, is_last: Callable[[], bool]) -> None:
        super().__init__(units)
        self._depth, self._is_last = depth, is_last
        self._history = PassHistory()
        self._pending: tuple[Unit, Direction] | None = None
        self.points: dict[Unit, dict[Direction, Point]] = {}
        for unit in self.units if communicates else ():
            attention = [module for name, module in unit.module.named_modules() if name.endswith(ATTENTION)]
            if attention:
                self.points[unit] = _points(unit, depth)
                attention[-1].register_forward_pre_hook(self._before_attention(unit), with_kwargs=True)
                attention[-1].register_forward_hook(self._after_attention(unit))

    def begin_step(self) -> None:
        """See `GatherHooks`; from now on, passes are expected in the order of the step before."""
        self._history.begin_step()

    def _before_attention(self, unit: Unit) -> Any:
        """Return a hook that finds the end of the attention's backward, at which its inputs have their gradients."""

        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in tensors_with_grad((*args, *kwargs.values()))[:1]:
                tensor.register_hook(lambda grad: self._launch(unit, Direction.BACKWARD))

        return hook

    def _after_attention(self, unit: Unit) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            if not in_backward():
                self._launch(unit, Direction.FORWARD)

        return hook

    def _use(self, unit: Unit, state: State) -> None:
        if state is State.FORWARD:
            if unit is self._order[0] and unit.module.training:
                self._history.begin_pass(Direction.FORWARD)
            if not self._is_all_gathered:
                self._release_except(self._window(unit, Direction.FORWARD))
        super()._use(unit, state)

    def _begin(self, unit: Unit, state: State) -> None:
        if not self._has_callback:
            self._history.begin_pass(Direction.BACKWARD)
        super()._begin(unit, state)

    def _prefetch(self, unit: Unit, direction: int) -> None:
        way = Direction.FORWARD if direction > 0 else Direction.BACKWARD
        self._pending = unit, way
        if unit not in self.points:
            self._launch(unit, way)
        elif self.points[unit][way] is Point.START and unit.state is not State.RECOMPUTE:
            self._launch(unit, way)  # otherwise its attention's forward is run again first

    def _launch(self, unit: Unit, direction: Direction) -> None:
        """Gather the window of a unit, unless this has been done since its `_prefetch`."""
        if self._pending != (unit, direction):
            return
        self._pending = None
        for other in self._window(unit, direction):
            self._gather(other)

    def _end_forward(self, unit: Unit) -> None:
        self._launch(unit, Direction.FORWARD)  # where attention did not run
        place = self._order.index(unit)
        if place == len(self._order) - 1:
            self._release_except(self._first_window(unit, Direction.FORWARD))
        elif unit not in self._window(self._order[place + 1], Direction.FORWARD):
            self._release(unit)

    def _release_finished(self, current: Unit | None) -> None:
        """Release what the backward does not use any more; with None, what the next pass does not use either."""
        if current is None:
            self._pending = None
            self._release_except(self._first_window(self._order[0], Direction.BACKWARD))
            return
        kept, place = self._window(current, Direction.BACKWARD), self._order.index(current)
        for at, unit in enumerate(self._order):
            if unit is current or (at < place and unit in kept):
                continue
            if unit.state is State.BACKWARD and unit in kept:
                unit.state = State.NOTHING
            elif unit.state is State.BACKWARD or at < place:
                self._release(unit)

    def _release_except(self, kept: Sequence[Unit]) -> None:
        for unit in self.units:
            if unit in kept:
                unit.state = State.NOTHING
            else:
                self._release(unit)

    def _following(self, unit: Unit, direction: Direction) -> Direction | None:
        """Return the direction of the pass that is expected after a unit's, with the same parameters."""
        following = self._history.following
        if direction is Direction.FORWARD:
            return following if unit.module.training else None
        if following is Direction.BACKWARD:
            return following
        return None if self._is_last() else Direction.FORWARD  # a step may be longer than the one before

    def _first_window(self, unit: Unit, direction: Direction) -> list[Unit]:
        """Return the window of the first unit of the pass that follows a unit's."""
        following = self._following(unit, direction)
        if following is Direction.FORWARD:
            return self._window(self._order[0], following)
        backward = [other for other in self._order if other.has_backward and other.is_reached]
        return self._window(backward[-1], following) if following and backward else []

    def _window(self, unit: Unit, direction: Direction) -> list[Unit]:
        has_backward = [other.has_backward and other.is_reached for other in self._order]
        following = self._following(unit, direction)
        places = window(self._order.index(unit), direction, has_backward, self._depth, following)
        return [self._order[place] for place in places]


def _points(unit: Unit, depth: int) -> dict[Direction, Point]:
    """Return where a layer starts gathers; its work is proportional to the elements of its weights."""
    before = after = 0
    for name, param in unit.module.named_parameters():
        if any(part.startswith(BEFORE_ATTENTION) for part in name.split(".")):
            before += param.numel()
        elif param.dim() > 1:
            after += param.numel()
    return {direction: launch_point(direction, depth, before, after) for direction in Direction}
