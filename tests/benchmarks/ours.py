"""Ours, as the attention benchmark calls it."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.attention.kernels.select import select_kernel
from megatron.longseq.attention.plan.comm_type import CommType
from megatron.longseq.attention.runtime.function import context_attention, make_call
from megatron.longseq.attention.runtime.process_groups import open_strategies
from tests.benchmarks.attention_contest import Contestant
from tests.benchmarks.peers import Attend


def attention(contestant: Contestant, group: dist.ProcessGroup) -> Attend:
    """Return our causal attention of local [n, b, h, d] tensors.

    Args:
        contestant: one of ours.
        group: its ranks; every rank of the job must call, for groups are made.
    """
    strategy = open_strategies(group, {"": CommType(contestant.mesh)}, None)[""]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernel = select_kernel(torch.device("cpu"), q.dtype, q.shape[-1]).kernel
        call = make_call(q, k, strategy, kernel, q.shape[-1] ** -0.5)
        return context_attention(q, k, v, call).unflatten(2, (q.shape[2], -1))

    return attend
