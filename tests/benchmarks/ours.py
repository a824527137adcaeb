"""Ours, as the attention benchmark calls it."""

import torch.distributed as dist
from torch import Tensor

from megatron.longseq.attention.context import asked, context_attention
from megatron.longseq.attention.kernels.cpu import CpuFlash
from megatron.longseq.attention.lanes import GroupExchange, GroupLane
from megatron.longseq.attention.ring import RingLanes
from megatron.longseq.attention.spread import Spread
from tests.benchmarks.attention_contest import Contestant
from tests.benchmarks.peers import Attend


def attention(contestant: Contestant, group: dist.ProcessGroup) -> Attend:
    """Return our causal attention of local [n, b, h, d] tensors.

    Args:
        contestant: one of ours.
        group: its ranks; every rank of the job must call, for groups are made.
    """
    mesh, members = contestant.mesh, list(range(contestant.ranks))
    ulysses = _own([dist.new_group(ranks) for ranks in mesh.ulysses_groups(members)])
    rings = [_own([dist.new_group(ranks) for ranks in mesh.ring_groups(members)]) for _ in range(4)]
    lanes = RingLanes(*(GroupLane(one) for one in rings))
    spread = Spread(mesh, dist.get_rank(), GroupExchange(ulysses) if mesh.ulysses > 1 else None, lanes)
    kernel = CpuFlash()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = asked(q, k, spread, kernel, q.shape[-1] ** -0.5)
        return context_attention(q, k, v, call).unflatten(2, (q.shape[2], -1))

    return attend


def _own(groups: list[dist.ProcessGroup]) -> dist.ProcessGroup:
    """Return the one that this rank is in; a rank outside of all calls nothing."""
    mine = [one for one in groups if one is not dist.GroupMember.NON_GROUP_MEMBER]
    return mine[0] if mine else groups[0]
