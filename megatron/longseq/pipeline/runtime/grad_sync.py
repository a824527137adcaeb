"""Accumulate gradients over segments, and synchronise them over data-parallel ranks as upstream's schedules do."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from megatron.longseq.pipeline.plan.schedule import Action, ActionKind
from megatron.longseq.sharding.runtime.ddp import ShardedDataParallel


class GradSync:
    """Calls upstream's no_sync_func, grad_sync_func and param_sync_func at the right actions.

    The gradients of a chunk are reduced once per step. Without a grad_sync_func, the hooks of the chunk's last backward
    start the reduction. With one (upstream's --align-grad-reduce, the default under --overlap-grad-reduce), all stages
    start at about the same time: rank r starts r backwards after the chunk's last one. If weight gradients are actions
    of their own, hooks would fire too early. Then the last WEIGHT action of a chunk starts the reductions, bucket by
    bucket (`BucketReductions`), with or without a grad_sync_func.

    Args:
        config: upstream's model config, which holds the callbacks.
        modules: this rank's model chunks.
        order: this rank's actions.
        rank: this rank's place in the pipeline.
    """

    def __init__(self, config: Any, modules: Sequence[torch.nn.Module], order: Sequence[Action], rank: int) -> None:
        self.config, self.modules = config, modules
        self.grad_sync = _per_chunk(config.grad_sync_func, len(modules))
        self.param_sync = _per_chunk(config.param_sync_func, len(modules)) if len(modules) > 1 else None
        self.no_sync: contextlib.ExitStack | None = None
        self.done: set[int] = set()
        backwards = [index for index, action in enumerate(order) if action.kind is ActionKind.BACKWARD]
        forwards = [index for index, action in enumerate(order) if action.kind is ActionKind.FORWARD]
        weights = {action.vstage: action for action in order if action.kind is ActionKind.WEIGHT}
        self.final_weights = {action for vstage, action in weights.items() if _overlaps(modules[vstage])}
        self.splits_weights = bool(weights)
        self.hooked = {} if self.splits_weights else self._hooked(order, backwards, rank)
        self.ends = {vstage: order[index].microbatch for index, vstage in self.hooked.items()}
        self.aligned = {} if self.splits_weights else self._aligned(order, backwards, rank)
        self.gathered = self._gathered(order, forwards, rank)

    def _hooked(self, order: Sequence[Action], backwards: list[int], rank: int) -> dict[int, int]:
        """Return backward index -> virtual stage whose hooks start the reduction there."""
        if self.grad_sync is None or (len(self.modules) == 1 and rank == 0):
            return {index: vstage for vstage, index in _lasts(order, backwards).items()}
        return {}

    def _aligned(self, order: Sequence[Action], backwards: list[int], rank: int) -> dict[int, int]:
        """Return backward index -> virtual stage whose reduction starts after it."""
        if self.grad_sync is None or len(self.modules) == 1:
            return {}
        place = {index: at for at, index in enumerate(backwards)}
        late = {vstage: place[index] + rank for vstage, index in _lasts(order, backwards).items()}
        return {backwards[at]: vstage for vstage, at in late.items() if at < len(backwards)}

    def _gathered(self, order: Sequence[Action], forwards: list[int], rank: int) -> dict[int, int]:
        """Return forward index -> virtual stage whose parameters are gathered before it.

        The parameters of the first two virtual stages are gathered at the start of the step.
        """
        firsts: dict[int, int] = {}
        for at, index in enumerate(forwards):
            firsts.setdefault(order[index].vstage, at)
        early = {vstage + 1: max(at - rank, 0) for vstage, at in firsts.items()}
        return {forwards[at]: vstage for vstage, at in early.items() if 1 < vstage < len(self.modules)}

    @contextlib.contextmanager
    def paused(self, *, forward_only: bool) -> Iterator[None]:
        """Suspend reductions during the step, and start the remaining ones at its end."""
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

    def is_final_weight(self, action: Action) -> bool:
        """Return whether a WEIGHT action is its chunk's last one of the step, so that reductions start in it."""
        if action not in self.final_weights:
            return False
        self.done.add(action.vstage)
        return True

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
        """Enclose the backward of a loss that has a graph of its own, at the start of the backward `action`.

        Parameters that the loss function itself uses get their gradient there. In the last micro-batch their hooks must
        be counted, or their bucket would not be reduced: upstream learns in its first step how often each parameter's
        hook fires.
        """
        ends = self.ends.get(action.vstage) == action.microbatch
        module = self.modules[action.vstage]
        if ends:
            self._resume()
        try:
            with module.loss_backward() if isinstance(module, ShardedDataParallel) else contextlib.nullcontext():
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
    """Return virtual stage -> index of its last backward."""
    return {order[index].vstage: index for index in backwards}


def _overlaps(module: torch.nn.Module) -> bool:
    return bool(getattr(getattr(module, "ddp_config", None), "overlap_grad_reduce", False))


class BucketReductions:
    """Starts the reduction of each bucket of a chunk during the chunk's last WEIGHT action.

    All other gradients are complete after the last BACKWARD, which comes before. So buckets without a weight of the
    action are reduced at once, while the first products are computed.

    Args:
        module: the chunk, in upstream's data-parallel wrapper.
        weights: whose gradients the action computes.
        complete: called with the parameters of a bucket just before its reduction; None: nothing to do.
    """

    def __init__(
        self,
        module: Any,
        weights: Collection[torch.nn.Parameter],
        complete: Callable[[Iterable[torch.nn.Parameter]], None] | None = None,
    ) -> None:
        self._complete = complete
        self._missing: dict[Any, set[torch.nn.Parameter]] = {}
        self._group_of: dict[torch.nn.Parameter, Any] = {}
        for group in (*module.bucket_groups, *module.expert_parallel_bucket_groups):
            self._missing[group] = {param for param in group.params if param in weights}
            self._group_of |= dict.fromkeys(self._missing[group], group)
            if not self._missing[group]:
                self._start(group)

    def ready(self, weight: torch.nn.Parameter) -> None:
        """Note that a weight's gradient is complete; with the last one of a bucket, start the bucket's reduction."""
        group = self._group_of.get(weight)
        if group is None:
            return
        self._missing[group].discard(weight)
        if not self._missing[group]:
            self._start(group)

    def _start(self, group: Any) -> None:
        if self._complete is not None:
            self._complete(group.params)
        group.start_grad_sync()


class GradSums:
    """Sums the gradients of a micro-batch's segments in float32 before they are added to a 16-bit `main_grad`.

    With --grad-reduce-in-bf16 (and --fp16) upstream's hooks add every gradient to a `main_grad` of 16 bits. With K
    segments they would do so K times per micro-batch, and the rounding error would grow. So `main_grad` is in float32
    memory of its own between the first and the last backward of a micro-batch. Whatever adds to `main_grad` (hooks,
    fused kernels, deferred weight gradients) adds to that memory.

    Only the memory of `main_grad` changes (its `data`). The tensor stays the same object, because upstream's layers
    with --gradient-accumulation-fusion keep it from their forward, and set `main_grad` to it in their backward.

    If upstream's hooks start to reduce a bucket in the last backward, a parameter's sum is added just before. Hooks run
    on a stream of their own, so such a sum is kept until `close`, when the current stream has waited for the backward.

    Args:
        module: a model chunk, in upstream's data-parallel wrapper or not. Sharded gradients are left as they are: they
            are reduced in every backward, and with --bf16 they are float32.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        is_sharded = isinstance(module, ShardedDataParallel)
        self.params = [] if is_sharded else [param for param in module.parameters() if _adds_in_half(param)]
        self.mains: dict[torch.nn.Parameter, torch.Tensor] = {}
        self.added: list[torch.Tensor] = []
        self.groups: list[Any] = []
        if self.params:
            groups = (*module.bucket_groups, *module.expert_parallel_bucket_groups)
            self.groups = [group for group in groups if group.ddp_config.overlap_grad_reduce]
        for group in self.groups:
            group.register_grad_ready = self._before(group, group.register_grad_ready)

    def detach(self) -> None:
        """Restore the function of upstream's bucket groups."""
        while self.groups:
            del self.groups.pop().register_grad_ready

    def open(self) -> None:
        """Accumulate gradients in float32 tensors until `close`; call this before a backward."""
        if self.mains:
            return
        for param in self.params:
            self.mains[param] = param.main_grad.data
            param.main_grad.data = torch.zeros_like(param.main_grad, dtype=torch.float32)

    def close(self, params: Iterable[torch.nn.Parameter] | None = None) -> None:
        """Add the sums to upstream's buffers and free them; call this when the micro-batch's gradients are complete.

        Args:
            params: whose sums to add; None: all.
        """
        for param in list(self.mains if params is None else params):
            self._add(param)
        self.added.clear()

    def reset(self) -> None:
        """Restore upstream's buffers and drop the sums, after a step that failed."""
        for param, main in self.mains.items():
            param.main_grad.data = main
        self.mains.clear()
        self.added.clear()

    @torch.no_grad()
    def _add(self, param: torch.nn.Parameter) -> None:
        main = self.mains.pop(param, None)
        if main is not None:
            sums = param.main_grad.data
            main.add_(sums)  # adds in float32 and rounds the result
            param.main_grad.data = main
            self.added.append(sums)

    def _before(self, group: Any, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def register_grad_ready(param: torch.nn.Parameter, *args: Any, **named: Any) -> None:
            if group.is_last_microbatch:
                self._add(param)
            original(param, *args, **named)

        return register_grad_ready


def _adds_in_half(param: torch.nn.Parameter) -> bool:
    main = getattr(param, "main_grad", None)
    return param.requires_grad and main is not None and main.dtype in {torch.bfloat16, torch.float16}
