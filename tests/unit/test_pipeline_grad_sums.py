"""Gradients of a micro-batch are added to a 16-bit buffer once, before upstream's hooks see them."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron.longseq.pipeline.runtime.grad_sync import GradSums

SEGMENTS = 64


class Group:
    """Stands for upstream's bucket group."""

    def __init__(self, overlaps: bool) -> None:
        self.ddp_config = Namespace(overlap_grad_reduce=overlaps)
        self.is_last_microbatch = False
        self.ready: list[torch.Tensor] = []

    def register_grad_ready(self, param: Any, force: bool) -> None:
        """Record the parameter whose gradient would be reduced."""
        self.ready.append(param.main_grad.clone())


def wrapped_model(dtype: torch.dtype, overlaps: bool = True) -> Any:
    """Return a chunk of two parameters, one frozen, as upstream's data-parallel wrapper leaves it."""
    module = torch.nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    module.weight.main_grad = torch.ones(2, 3, dtype=dtype)
    module.bucket_groups, module.expert_parallel_bucket_groups = [Group(overlaps)], []
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_last", [False, True])
def test_a_micro_batch_is_rounded_once(dtype: torch.dtype, is_last: bool) -> None:
    module = wrapped_model(dtype)
    group, main = module.bucket_groups[0], module.weight.main_grad
    sums, step = GradSums(module), torch.finfo(dtype).eps / 8  # by itself lost beside 1
    for segment in reversed(range(SEGMENTS)):
        sums.open()
        assert module.weight.main_grad.dtype is torch.float32 and main.eq(1).all()
        module.weight.main_grad.add_(torch.full((2, 3), step, dtype=dtype))  # upstream's hook
        group.is_last_microbatch = is_last and not segment
        group.register_grad_ready(module.weight, False)
    sums.close()
    assert module.weight.main_grad is main and main.eq(1 + SEGMENTS * step).all()
    assert group.ready[-1].dtype is (dtype if is_last else torch.float32)
    if is_last:
        assert group.ready[-1].equal(main)  # complete, and in the buffer that is reduced
    sums.detach()
    assert "register_grad_ready" not in vars(group)


def test_a_step_that_failed_leaves_upstreams_buffers() -> None:
    module = wrapped_model(torch.bfloat16)
    main, sums = module.weight.main_grad, GradSums(module)
    sums.open()
    module.weight.main_grad.add_(1)
    sums.reset()
    assert module.weight.main_grad is main and main.eq(1).all() and not sums.mains


def test_other_buffers_are_left_alone() -> None:
    module = wrapped_model(torch.float32)
    main, sums = module.weight.main_grad, GradSums(module)
    sums.open()
    assert module.weight.main_grad is main and not sums.groups
    sums.close()
    plain = torch.nn.Linear(3, 2)
    assert not GradSums(plain).params
