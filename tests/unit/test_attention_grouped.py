"""Grouped key heads in bfloat16 are as accurate as PyTorch's attention with repeated heads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron.longseq.attention.plan.layout import Mesh
from tests.unit.attention_bed import SCALE
from tests.unit.context_run import Problem, run

TOKENS = 256
WAYS: dict[str, dict[str, Any]] = {
    "one rank": {"mesh": Mesh(1, 1)},
    "one rank, segments": {"mesh": Mesh(1, 1), "lengths": (TOKENS // 2, TOKENS // 4, TOKENS // 4)},
    "Ulysses 2": {"mesh": Mesh(2, 1)},
    "Ulysses 4": {"mesh": Mesh(4, 1)},
    "ring 2": {"mesh": Mesh(1, 2)},
    "gathered": {"mesh": Mesh(1, 2), "gathers": True},
    "Ulysses 2, segments": {"mesh": Mesh(2, 1), "lengths": (TOKENS // 2, TOKENS // 4, TOKENS // 4)},
}
SLACK = 1.02  # of norms over some ten thousand roundings each; the same sums in another order differ by less


def repeated(inputs: list[Tensor]) -> list[Tensor]:
    """Return out, dq, dk, dv of PyTorch's attention, with each key head repeated for its query heads."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    copies = leaves[0].shape[2] // leaves[1].shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in leaves)
    k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE).permute(2, 0, 1, 3).flatten(2)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(
    "heads", [(8, 1), (12, 4), *(pytest.param(h, marks=pytest.mark.slow) for h in ((32, 4), (64, 8)))], ids=str
)
def test_gradients_of_shared_heads_are_no_worse_than_of_repeated_ones(
    heads: tuple[int, int], tell: Callable[[str], None]
) -> None:
    problem = Problem(Mesh(1, 1), heads, (TOKENS,), batch=1, dim=32, dtype=torch.bfloat16)
    inputs = problem.inputs()
    exact = problem.expected(inputs)
    theirs = errors(repeated(inputs), exact)
    assert max(theirs) < 0.02
    worst = {}
    for way, options in WAYS.items():
        chosen: dict[str, Any] = {"lengths": (TOKENS,), **options}
        ours = errors(run(Problem(heads=heads, batch=1, dim=32, dtype=torch.bfloat16, **chosen)), exact)
        worst[way] = [our / their for our, their in zip(ours, theirs, strict=True)]
    figures = "; ".join(f"{way} {' '.join(f'{x:.2f}' for x in row)}" for way, row in worst.items())
    tell(f"bfloat16 error over PyTorch's with repeated heads, {heads}, of out, dq, dk, dv: {figures}")
    assert max(max(row) for row in worst.values()) <= SLACK, worst
