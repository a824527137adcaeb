"""Parameters that are whole only while they are used: gathered before a unit's forward and its backward.

A unit is what is gathered at once: a transformer layer, the embedding, the output layer. While one computes, the next
one's parameters come; they go once the unit after it, in the same direction, has begun. Scratch for gradients is there
from the beginning of a unit's backward on: fused kernels write into it before any hook of a parameter runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch

from megatron.longseq.sharding.runtime.bucket_storage import GradStore, ParamStore


class State(Enum):
    """What a unit's parameters are whole for."""

    NOTHING = auto()
    FORWARD = auto()
    AGAIN = auto()  # forward inside a backward (recomputation), whose own backward follows
    BACKWARD = auto()


@dataclass(eq=False)
class Unit:
    """A module whose parameters are gathered at once.

    Attributes:
        name: of the module.
        module: it.
        stores: of its parameters; a tied weight's is in two units.
        has_backward: whether its backward reads them (an embedding's does not).
        grads: of buckets that its backward adds to.
        is_reached: whether a backward has; frozen layers below all that is trained have none.
    """

    name: str
    module: torch.nn.Module
    stores: Sequence[ParamStore]
    has_backward: bool = True
    grads: Sequence[GradStore] = ()
    is_reached: bool = False
    state: State = field(default=State.NOTHING)


class Uses:
    """Gathers and releases the parameters of a model chunk's units, as forward and backward pass through them.

    Args:
        units: in any order; the first forward tells in which they follow, the first backward which it reaches.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self._order: list[Unit] = []
        self._is_waiting = False
        self._are_whole = True  # as the model was made
        for unit in self.units:
            unit.module.register_forward_pre_hook(self._entering(unit), prepend=True)
            unit.module.register_forward_hook(self._leaving(unit))

    def make_whole(self) -> None:
        """Have all parameters whole, until the first is used."""
        self._are_whole = True
        for unit in self.units:
            self._gather(unit)
        for unit in self.units:
            self._wait(unit)

    def release_all(self) -> None:
        """Give all whole parameters back."""
        self._are_whole = False
        for unit in self.units:
            self._release(unit)

    def _entering(self, unit: Unit) -> Any:
        def hook(module: torch.nn.Module, args: Any) -> None:
            if _in_backward():
                self._begin(unit, State.AGAIN)
                return
            if unit not in self._order:
                self._order.append(unit)
            self._open(unit, State.FORWARD)
            self._prefetch(unit, +1)

        return hook

    def _leaving(self, unit: Unit) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                tensor.register_hook(lambda grad: self._begin_backward(unit))
            if not _in_backward():
                self._release(unit)

        return hook

    def _begin_backward(self, unit: Unit) -> None:
        for grads in unit.grads:
            grads.open()
        if unit.has_backward:
            self._begin(unit, State.BACKWARD)

    def _begin(self, unit: Unit, state: State) -> None:
        """Have a unit whole inside a backward; those whose backward was before it are done."""
        if state is State.BACKWARD and unit.state is State.BACKWARD:
            return
        unit.is_reached = True
        self._release_done(unit)
        self._open(unit, state)
        self._prefetch(unit, -1)
        if not self._is_waiting:
            self._is_waiting = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)  # type: ignore[attr-defined]

    def _end_of_backward(self) -> None:
        self._is_waiting = False
        self._release_done(None)

    def _release_done(self, current: Unit | None) -> None:
        for unit in self.units:
            if unit is not current and unit.state is State.BACKWARD:
                self._release(unit)

    def _open(self, unit: Unit, state: State) -> None:
        if self._are_whole:
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

    def _gather(self, unit: Unit) -> None:
        for store in unit.stores:
            store.finish_sync()
            store.gather(unit.name)

    def _wait(self, unit: Unit) -> None:
        for store in unit.stores:
            store.wait()

    def _release(self, unit: Unit) -> None:
        unit.state = State.NOTHING
        for store in unit.stores:
            store.release(unit.name)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def _tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of a module's output that a backward comes through."""
    values = output if isinstance(output, tuple | list) else (output,)
    return [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]
