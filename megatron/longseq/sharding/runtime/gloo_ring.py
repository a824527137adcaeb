"""Phases message by message, for a backend whose own collectives are no rings.

Gloo's reduce-scatter sends what an all-reduce does, twice what it has to. Its ring over logical ranks would cross from
node to node at every hop, where one over neighbours does so once. Here every message is one of `ring.ring_steps`.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.sharding.plan.collectives import Phase
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.ring import Piece, Run, Step, ring_steps
from megatron.longseq.sharding.runtime.collectives import Collectives, Communicators, Region


class RingMessages(Collectives):
    """Runs phases as rings of messages; arguments as of `Collectives`."""

    def __init__(self, groups: Groups, communicators: Communicators, *, average: bool = False) -> None:
        super().__init__(groups, communicators, average=average)
        self._average = average
        ranks = dist.get_process_group_ranks(communicators.logical)
        self._global = [ranks[groups.logical(member)] for member in range(groups.ranks)]
        self._steps = cache(self._plan)

    def _plan(self, phase: Phase) -> tuple[Step, ...]:
        return ring_steps(self._groups, Run(0, 0, 0, phase), self._communicators.member)

    def _send(self, phase: Phase, region: Region) -> int:
        group = self._communicators.scopes[phase.scope]
        first = 0 if region.whole is not None else self._number * self._groups.count
        flat = region.whole if region.whole is not None else region.part
        shard = region.part.numel() // self._groups.count
        steps, sent = self._steps(phase), 0
        adding = [step.number for step in steps if step.receive.adds]

        def cut(piece: Piece) -> Tensor:
            return flat[(piece.begin - first) * shard : (piece.end - first) * shard]

        for step in steps:
            target, given = cut(step.receive), cut(step.send)
            self._exchange(step, target, given, group)
            sent += given.nbytes
            if self._average and adding and step.number == adding[-1]:
                target.div_(group.size())
        return sent

    def _exchange(self, step: Step, target: Tensor, given: Tensor, group: Any) -> None:
        into = torch.empty_like(target) if step.receive.adds else target
        # Received first: gloo says that it is ready over the same connection, and that would wait behind the send.
        works = [
            dist.irecv(into, self._global[step.receive.peer], group=group),
            dist.isend(given, self._global[step.send.peer], group=group),
        ]
        for work in works:
            work.wait()
        if step.receive.adds:
            target.add_(into)


def runner_for(groups: Groups, communicators: Communicators, *, average: bool = False) -> Collectives:
    """Return what runs phases best on the backend of these communicators."""
    kind = RingMessages if dist.get_backend(communicators.logical) == "gloo" else Collectives
    return kind(groups, communicators, average=average)
