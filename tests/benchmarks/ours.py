"""Ours, as the attention benchmark calls it."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.attention.kernels.select import choose
from megatron.longseq.attention.plan.comm_type import Way
from megatron.longseq.attention.runtime.function import asked, context_attention
from megatron.longseq.attention.runtime.process_groups import open_spreads
from tests.benchmarks.attention_contest import Contestant
from tests.benchmarks.peers import Attend


def attention(contestant: Contestant, group: dist.ProcessGroup) -> Attend:
    """Return our causal attention of local [n, b, h, d] tensors.

    Args:
        contestant: one of ours.
        group: its ranks; every rank of the job must call, for groups are made.
    """
    spread = open_spreads(group, {"": Way(contestant.mesh)}, None)[""]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernel = choose(torch.device("cpu"), q.dtype, q.shape[-1]).kernel
        call = asked(q, k, spread, kernel, q.shape[-1] ** -0.5)
        return context_attention(q, k, v, call).unflatten(2, (q.shape[2], -1))

    return attend
