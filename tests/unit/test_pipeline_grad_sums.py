"""Gradients of a micro-batch are added to a 16-bit buffer once, before upstream's hooks see them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.longseq.pipeline.runtime.grad_sync import GradSums

SEGMENTS = 64


class Group:
    """Stands for upstream's bucket group."""

    def __init__(self, overlaps: bool) -> None:
        self.ddp_config = SimpleNamespace(overlap_grad_reduce=overlaps)
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
    group, buffer = module.bucket_groups[0], torch.ones(2, 2, 3, dtype=dtype)
    module.weight.main_grad, main = buffer[1], buffer[1]
    sums, step = GradSums(module), torch.finfo(dtype).eps / 8  # by itself lost beside 1
    for segment in reversed(range(SEGMENTS)):
        sums.open()
        assert module.weight.main_grad.dtype is torch.float32 and main.eq(1).all()
        module.weight.main_grad.add_(torch.full((2, 3), step, dtype=dtype))  # upstream's hook
        group.is_last_microbatch = is_last and not segment
        group.register_grad_ready(module.weight, False)
    sums.close()
    assert module.weight.main_grad.data_ptr() == main.data_ptr() and main.eq(1 + SEGMENTS * step).all()
    assert buffer[0].eq(1).all() and module.weight.main_grad.dtype is dtype
    assert group.ready[-1].dtype is (dtype if is_last else torch.float32)
    if is_last:
        assert group.ready[-1].equal(main)  # complete, and in the buffer that is reduced
    sums.detach()
    assert "register_grad_ready" not in vars(group)


def _forward(module: Any, layers: Any) -> torch.Tensor:
    ones = torch.ones(1, 1, 3, dtype=torch.bfloat16, requires_grad=True)
    fused = layers.LinearWithGradAccumulationAndAsyncCommunication
    return fused.apply(ones, module.weight, None, True, False, False, None, None, None, 1).sum()


@pytest.mark.parametrize("order", ["f0 f1 b1 b0 c", "f0 f1 f2 b1 f3 b0 c b3 b2 c"], ids=["in turn", "one ahead"])
@pytest.mark.parametrize("is_last", [False, True])
def test_fused_weight_gradients(order: str, is_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's fused layer keeps `main_grad` from its forward, when other or no sums are open."""
    from megatron.core.tensor_parallel import layers

    def add(total: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        main_grad.add_((grad_output.float().t() @ total.float()).to(main_grad.dtype))

    kernels = SimpleNamespace(wgrad_gemm_accum_fp16=add, wgrad_gemm_accum_fp32=add)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernels, raising=False)
    module = wrapped_model(torch.bfloat16)
    module.weight.data = torch.ones(2, 3, dtype=torch.bfloat16)
    group, main, losses = module.bucket_groups[0], module.weight.main_grad.data, dict[str, torch.Tensor]()
    sums, actions = GradSums(module), 3 * order.split()
    for number, action in enumerate(actions):
        if action.startswith("f"):
            losses[action[1:]] = _forward(module, layers)
        elif action.startswith("b"):
            sums.open()
            losses.pop(action[1:]).backward()
            group.is_last_microbatch = is_last and number == len(actions) - 2
            group.register_grad_ready(module.weight, False)
        else:
            sums.close()
    count = 3 * order.count("b")
    assert main.eq(1 + count).all() and module.weight.main_grad.data_ptr() == main.data_ptr()
    assert len(group.ready) == count and (not is_last or group.ready[-1].equal(main))


def test_a_step_that_failed_leaves_upstreams_buffers() -> None:
    module = wrapped_model(torch.bfloat16)
    main, sums = module.weight.main_grad, GradSums(module)
    sums.open()
    module.weight.main_grad.add_(1)
    sums.reset()
    assert module.weight.main_grad is main and main.eq(1).all() and not sums.mains and main.dtype is torch.bfloat16


def test_other_buffers_are_left_alone() -> None:
    module = wrapped_model(torch.float32)
    main, sums = module.weight.main_grad, GradSums(module)
    sums.open()
    assert module.weight.main_grad is main and not sums.groups
    sums.close()
    plain = torch.nn.Linear(3, 2)
    assert not GradSums(plain).params
