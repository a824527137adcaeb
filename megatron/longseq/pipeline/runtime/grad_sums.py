"""The gradients of one micro-batch, summed over its segments in float32 before they meet upstream's 16-bit buffers."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron.longseq.sharding.runtime.ddp import ShardedDataParallel


class GradSums:
    """Let each micro-batch add to a 16-bit `main_grad` once, as it does with whole sequences.

    With --grad-reduce-in-bf16 (and --fp16) upstream's hooks add every gradient to a `main_grad` of 16 bits, K times as
    often under segments. Between the first and the last backward of a micro-batch a float32 tensor is in the place of
    `main_grad`. Whatever adds to `main_grad` (hooks, fused kernels, deferred weight gradients) adds to that.

    Where upstream's hooks start to reduce a bucket in the last backward, a parameter's sum is added just before.

    Args:
        module: a model chunk, in upstream's data-parallel wrapper or not. Sharded gradients are left alone: they are
            reduced in every backward, and with --bf16 they are float32.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        is_sharded = isinstance(module, ShardedDataParallel)
        self.params = [] if is_sharded else [param for param in module.parameters() if _adds_in_half(param)]
        self.mains: dict[torch.nn.Parameter, torch.Tensor] = {}
        self.groups: list[Any] = []
        if self.params:
            groups = (*module.bucket_groups, *module.expert_parallel_bucket_groups)
            self.groups = [group for group in groups if group.ddp_config.overlap_grad_reduce]
        for group in self.groups:
            group.register_grad_ready = self._before(group, group.register_grad_ready)

    def detach(self) -> None:
        """Give upstream's bucket groups their own function back."""
        while self.groups:
            del self.groups.pop().register_grad_ready

    def open(self) -> None:
        """Call before a backward: gradients go into float32 tensors until `close`."""
        if self.mains:
            return
        for param in self.params:
            self.mains[param] = param.main_grad
            param.main_grad = torch.zeros_like(param.main_grad, dtype=torch.float32)

    def close(self) -> None:
        """Call when the micro-batch's gradients are complete: add them to upstream's buffers and free the memory."""
        for param in list(self.mains):
            self._add(param)

    def reset(self) -> None:
        """Give parameters upstream's buffers back, after a step that did not end; what was summed is dropped."""
        for param, main in self.mains.items():
            param.main_grad = main
        self.mains.clear()

    @torch.no_grad()
    def _add(self, param: torch.nn.Parameter) -> None:
        main = self.mains.pop(param, None)
        if main is not None:
            main.add_(param.main_grad)  # adds in float32 and rounds the result
            param.main_grad = main

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
