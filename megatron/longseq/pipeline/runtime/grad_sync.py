"""When gradients and parameters are synchronised over data-parallel ranks in a step: as upstream's schedules do it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron.longseq.pipeline.plan.schedule import Action, Kind


class GradSync:
    """Upstream's no-sync, gradient-sync and parameter-sync callbacks at the right actions.

    A chunk's gradients are reduced once, with the last backward of the step. Without a grad_sync_func the hooks of that
    backward start it. With one (upstream's --align-grad-reduce, the default under --overlap-grad-reduce) all stages
    start at about the same time: a rank is as many backwards late as it has ranks before it. Where weight gradients are
    actions of their own, hooks would fire too early, and everything is reduced after the last action.

    Args:
        config: upstream's model config, which holds the callbacks.
        modules: this rank's model chunks.
        order: this rank's actions.
        rank: its place in the pipeline.
    """

    def __init__(self, config: Any, modules: Sequence[torch.nn.Module], order: Sequence[Action], rank: int) -> None:
        self.config, self.modules = config, modules
        self.grad_sync = _per_chunk(config.grad_sync_func, len(modules))
        self.param_sync = _per_chunk(config.param_sync_func, len(modules)) if len(modules) > 1 else None
        self.no_sync: contextlib.ExitStack | None = None
        self.done: set[int] = set()
        backwards = [index for index, action in enumerate(order) if action.kind is Kind.BACKWARD]
        forwards = [index for index, action in enumerate(order) if action.kind is Kind.FORWARD]
        self.splits_weights = any(action.kind is Kind.WEIGHT for action in order)
        self.hooked = {} if self.splits_weights else self._hooked(order, backwards, rank)
        self.ends = {vstage: order[index].microbatch for index, vstage in self.hooked.items()}
        self.aligned = {} if self.splits_weights else self._aligned(order, backwards, rank)
        self.gathered = self._gathered(order, forwards, rank)

    def _hooked(self, order: Sequence[Action], backwards: list[int], rank: int) -> dict[int, int]:
        """Backward index -> virtual stage whose hooks reduce there."""
        if self.grad_sync is None or (len(self.modules) == 1 and rank == 0):
            return {index: vstage for vstage, index in _lasts(order, backwards).items()}
        return {}

    def _aligned(self, order: Sequence[Action], backwards: list[int], rank: int) -> dict[int, int]:
        """Backward index -> virtual stage that is reduced after it."""
        if self.grad_sync is None or len(self.modules) == 1:
            return {}
        place = {index: at for at, index in enumerate(backwards)}
        late = {vstage: place[index] + rank for vstage, index in _lasts(order, backwards).items()}
        return {backwards[at]: vstage for vstage, at in late.items() if at < len(backwards)}

    def _gathered(self, order: Sequence[Action], forwards: list[int], rank: int) -> dict[int, int]:
        """Forward index -> virtual stage whose parameters are gathered before it (the first two at the start)."""
        firsts: dict[int, int] = {}
        for at, index in enumerate(forwards):
            firsts.setdefault(order[index].vstage, at)
        early = {vstage + 1: max(at - rank, 0) for vstage, at in firsts.items()}
        return {forwards[at]: vstage for vstage, at in early.items() if 1 < vstage < len(self.modules)}

    @contextlib.contextmanager
    def paused(self, *, forward_only: bool) -> Iterator[None]:
        """Hold reductions back during the step, and start those that are left at its end."""
        self._pause()
        if self.param_sync is not None and not forward_only:
            for vstage in (0, 1):
                self.param_sync[vstage](self.modules[vstage].parameters())
        try:
            yield
        finally:
            self._resume()
        if forward_only:
            return
        for vstage, module in enumerate(self.modules):
            if vstage in self.done:
                continue
            if self.grad_sync is not None:
                self.grad_sync[vstage](module.parameters())
            elif self.splits_weights and _overlaps(module):
                module.start_grad_sync()

    def before(self, index: int) -> None:
        """Call before action `index`."""
        vstage = self.gathered.get(index)
        if vstage is not None and self.param_sync is not None:
            self.param_sync[vstage](self.modules[vstage].parameters())
        if index in self.hooked:
            self._resume()
            self.done.add(self.hooked[index])

    def after(self, index: int) -> None:
        """Call after action `index`."""
        if index in self.aligned and self.grad_sync is not None:
            vstage = self.aligned[index]
            self._resume()
            self.grad_sync[vstage](self.modules[vstage].parameters())
            self.done.add(vstage)
        if len(self.modules) > 1 and (index in self.aligned or index in self.hooked):
            self._pause()

    @contextlib.contextmanager
    def around_loss(self, action: Action) -> Iterator[None]:
        """Around the backward of a loss that has a graph of its own, which begins the backward `action`.

        Parameters that the loss function uses itself have their gradient there. In the last micro-batch their hooks
        have to count, or a bucket with hooks that reduce it would wait for them; upstream knows from its first step how
        often each parameter's hook counts.
        """
        ends = self.ends.get(action.vstage) == action.microbatch
        if ends:
            self._resume()
        try:
            yield
        finally:
            if ends:
                self._pause()

    def _pause(self) -> None:
        contexts = self.config.no_sync_func
        if contexts is not None and self.no_sync is None:
            self.no_sync = contextlib.ExitStack()
            for context in contexts if isinstance(contexts, list) else [contexts]:
                self.no_sync.enter_context(context())

    def _resume(self) -> None:
        if self.no_sync is not None:
            self.no_sync.close()
            self.no_sync = None


def _per_chunk(callback: Any, chunks: int) -> list[Callable[..., Any]] | None:
    if callback is None or isinstance(callback, list):
        return callback
    return [callback] * chunks


def _lasts(order: Sequence[Action], backwards: list[int]) -> dict[int, int]:
    """Virtual stage -> index of its last backward."""
    return {order[index].vstage: index for index in backwards}


def _overlaps(module: torch.nn.Module) -> bool:
    return bool(getattr(getattr(module, "ddp_config", None), "overlap_grad_reduce", False))
