"""Gather sharded parameters before a unit's forward and its backward, and release them afterwards.

A unit is what is gathered at once: a transformer layer, the embedding, the output layer. While one unit computes, the
parameters of the next one are gathered; they are released once the unit after it, in the same direction, has started.
Scratch memory for gradients is allocated when a unit's backward starts, as fused kernels write into it before any hook
of a parameter runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch

from megatron.longseq.sharding.runtime.bucket_storage import GradStore, ParamStore


class State(Enum):
    """What a unit's parameters are gathered for."""

    NOTHING = auto()
    FORWARD = auto()
    RECOMPUTE = auto()  # a forward inside a backward, which the unit's own backward follows
    BACKWARD = auto()


@dataclass(eq=False)
class Unit:
    """A module whose parameters are gathered at once.

    Attributes:
        name: of the module.
        module: the module.
        stores: of its parameters; those of a tied weight belong to two units.
        has_backward: whether its backward reads its parameters; an embedding's does not.
        grads: stores of gradients that its backward adds to.
        tails: further modules with parameters of the unit, which run after `module`, such as the final norm.
        is_reached: whether a backward has reached it; frozen layers below all trained ones have no backward.
        state: what its parameters are gathered for.
    """

    name: str
    module: torch.nn.Module
    stores: Sequence[ParamStore]
    has_backward: bool = True
    grads: Sequence[GradStore] = ()
    tails: Sequence[torch.nn.Module] = ()
    is_reached: bool = False
    state: State = field(default=State.NOTHING)


class GatherHooks:
    """Gathers and releases the parameters of a model chunk's units, as forward and backward pass through them.

    Args:
        units: in any order. The first forward shows their order, the first backward which of them it reaches.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self._order: list[Unit] = []
        self._has_callback = False
        self._is_all_gathered = False
        for unit in self.units:
            modules = (unit.module, *unit.tails)
            for module in modules:
                module.register_forward_pre_hook(self._before_forward(unit), prepend=True)
                module.register_forward_hook(self._after_forward(unit, is_last=module is modules[-1]))

    def gather_all(self) -> None:
        """Gather all parameters; they stay until the first unit is used."""
        self._is_all_gathered = True
        for unit in self.units:
            self._gather(unit, is_pooled=False)  # the pool must not keep an unsharded model
        for unit in self.units:
            self._wait(unit)

    def begin_step(self) -> None:
        """Note that a step of the optimizer is over, and another one begins."""

    def release_all(self) -> None:
        """Release all full buckets."""
        self._is_all_gathered = False
        for unit in self.units:
            self._release(unit)

    def _before_forward(self, unit: Unit) -> Any:
        def hook(module: torch.nn.Module, args: Any) -> None:
            if in_backward():
                self._begin(unit, State.RECOMPUTE)
                return
            if unit not in self._order:
                self._order.append(unit)
            if unit.state is not State.FORWARD or module is unit.module:
                self._use(unit, State.FORWARD)
                self._prefetch(unit, +1)

        return hook

    def _after_forward(self, unit: Unit, *, is_last: bool) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            for tensor in tensors_with_grad(output):
                tensor.register_hook(lambda grad: self._begin_backward(unit))
            if is_last and not in_backward():
                self._end_forward(unit)

        return hook

    def _end_forward(self, unit: Unit) -> None:
        self._release(unit)

    def _begin_backward(self, unit: Unit) -> None:
        for grads in unit.grads:
            grads.prepare()
        if unit.has_backward:
            self._begin(unit, State.BACKWARD)

    def _begin(self, unit: Unit, state: State) -> None:
        """Gather a unit inside a backward, and release the units whose backward came before it."""
        if state is State.BACKWARD and unit.state is State.BACKWARD:
            return
        unit.is_reached = True
        self._release_finished(unit)
        self._use(unit, state)
        self._prefetch(unit, -1)
        if not self._has_callback:
            self._has_callback = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)  # type: ignore[attr-defined]

    def _end_of_backward(self) -> None:
        self._has_callback = False
        self._release_finished(None)

    def _release_finished(self, current: Unit | None) -> None:
        for unit in self.units:
            if unit is not current and unit.state is State.BACKWARD:
                self._release(unit)

    def _use(self, unit: Unit, state: State) -> None:
        if self._is_all_gathered:
            self.release_all()
        unit.state = state
        self._gather(unit)
        self._wait(unit)

    def _prefetch(self, unit: Unit, direction: int) -> None:
        at = self._order.index(unit) + direction
        if not 0 <= at < len(self._order):
            return
        following = self._order[at]
        if direction > 0 or following.is_reached:
            self._gather(following)

    def _gather(self, unit: Unit, *, is_pooled: bool = True) -> None:
        for store in unit.stores:
            store.gather(unit.name, is_pooled=is_pooled)

    def _wait(self, unit: Unit) -> None:
        for store in unit.stores:
            store.wait()

    def _release(self, unit: Unit) -> None:
        unit.state = State.NOTHING
        for store in unit.stores:
            store.release(unit.name)


def in_backward() -> bool:
    """Return whether autograd runs a backward in this thread."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def tensors_with_grad(output: Any) -> list[torch.Tensor]:
    """Return the tensors of a module's inputs or output that require a gradient."""
    values = output if isinstance(output, tuple | list) else (output,)
    return [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]
