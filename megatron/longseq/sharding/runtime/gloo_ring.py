"""Collectives as rings of point-to-point messages, for gloo, whose own collectives are no rings.

Gloo's reduce-scatter sends as much as an all-reduce, twice what is needed, and its ring over logical ranks would cross
from node to node at every hop. A ring over neighbours leaves a group once.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.sharding.plan.collectives import Collective, CollectiveKind, Scope
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.collectives import CollectiveRunner, Region
from megatron.longseq.sharding.runtime.process_groups import Communicators


class ShardTransfer(NamedTuple):
    """Shards [begin, end) of a bucket, sent to or received from a peer; with `adds` the receiver adds them."""

    peer: int
    begin: int
    end: int
    adds: bool


class RingMessage(NamedTuple):
    """One step of a member in a ring: it sends one piece and receives one at the same time.

    Attributes:
        number: of the step.
        send: to the next member of the ring.
        receive: from the previous member of the ring.
    """

    number: int
    send: ShardTransfer
    receive: ShardTransfer


def ring_messages(groups: RankGroups, collective: Collective, member: int) -> tuple[RingMessage, ...]:
    """Return the steps of a member in a ring; all pieces are contiguous and arrive where they belong.

    In a reduce-scatter, the piece that ends at a member starts at the next one and collects sums on its way round. In
    an all-gather, a member's own piece goes round all other members. An all-reduce is one after the other.

    Args:
        groups: the data-parallel ranks.
        collective: what runs.
        member: data-parallel rank, as upstream numbers it.
    """
    ring = ring_of(groups, collective.scope, member)
    place, size = ring.index(member), len(ring)
    adding = 0 if collective.kind is CollectiveKind.ALL_GATHER else size - 1
    steps = []
    for number in range(collective.steps(groups)):
        adds = number < adding
        back = number + 1 if adds else number - adding
        sent, received = ring[(place - back) % size], ring[(place - back - 1) % size]
        steps.append(
            RingMessage(
                number,
                ShardTransfer(ring[(place + 1) % size], *_piece(groups, collective.scope, sent), adds),
                ShardTransfer(ring[(place - 1) % size], *_piece(groups, collective.scope, received), adds),
            )
        )
    return tuple(steps)


def ring_of(groups: RankGroups, scope: Scope, member: int) -> tuple[int, ...]:
    """Return the members of a member's ring, in order: a flat ring leaves each group once.

    Args:
        groups: the data-parallel ranks.
        scope: inside a group, between groups, or flat.
        member: data-parallel rank, as upstream numbers it.
    """
    group, number = divmod(member, groups.size)
    if scope is Scope.FLAT:
        return tuple(range(groups.ranks))
    if scope is Scope.INSIDE:
        return tuple(range(group * groups.size, (group + 1) * groups.size))
    return tuple(range(number, groups.ranks, groups.size))


def _piece(groups: RankGroups, scope: Scope, member: int) -> tuple[int, int]:
    """Return the shards that a member has after a reduce-scatter, and before an all-gather."""
    owned = groups.owned(Level.GROUP if scope is Scope.INSIDE else Level.GLOBAL, member)
    return owned.start, owned.stop


class GlooRingRunner(CollectiveRunner):
    """Runs collectives as rings of messages; see `CollectiveRunner` for the arguments."""

    def __init__(self, groups: RankGroups, communicators: Communicators, *, average: bool = False) -> None:
        super().__init__(groups, communicators, average=average)
        self._average = average
        ranks = dist.get_process_group_ranks(communicators.logical)
        self._global = [ranks[groups.logical(member)] for member in range(groups.ranks)]
        self._received: dict[tuple[Scope, int, torch.dtype], Tensor] = {}
        self._steps = cache(lambda collective: ring_messages(groups, collective, communicators.member))

    def _send(self, collective: Collective, region: Region) -> int:
        group = self._communicators.scopes[collective.scope]
        first = 0 if region.full is not None else self._number * self._groups.count
        flat = region.full if region.full is not None else region.group_slice
        shard = region.group_slice.numel() // self._groups.count
        steps, sent = self._steps(collective), 0
        adding = [step.number for step in steps if step.receive.adds]

        def piece(transfer: ShardTransfer) -> Tensor:
            return flat[(transfer.begin - first) * shard : (transfer.end - first) * shard]

        for step in steps:
            target, outgoing = piece(step.receive), piece(step.send)
            self._exchange(collective.scope, step, target, outgoing, group)
            sent += outgoing.nbytes
            if self._average and adding and step.number == adding[-1]:
                target.div_(group.size())
        return sent

    def _scratch(self, scope: Scope, target: Tensor) -> Tensor:
        """Return memory for a received piece; the collectives of a scope run one after the other, on one queue."""
        key = scope, target.numel(), target.dtype
        if key not in self._received:
            self._received[key] = torch.empty_like(target)
        return self._received[key]

    def _exchange(self, scope: Scope, step: RingMessage, target: Tensor, outgoing: Tensor, group: Any) -> None:
        into = self._scratch(scope, target) if step.receive.adds else target
        # Post the receive first: gloo announces it over the same connection, where it would wait behind the send.
        works = [
            dist.irecv(into, self._global[step.receive.peer], group=group),
            dist.isend(outgoing, self._global[step.send.peer], group=group),
        ]
        for work in works:
            work.wait()
        if step.receive.adds:
            target.add_(into)


def runner_for(groups: RankGroups, communicators: Communicators, *, average: bool = False) -> CollectiveRunner:
    """Return the runner for the backend of the communicators.

    Args:
        groups, communicators, average: see `CollectiveRunner`.
    """
    kind = GlooRingRunner if dist.get_backend(communicators.logical) == "gloo" else CollectiveRunner
    return kind(groups, communicators, average=average)
