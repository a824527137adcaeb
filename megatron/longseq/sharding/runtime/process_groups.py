"""Process groups of a strategy: those that its collectives run on, and those that upstream's optimizer works with."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from megatron.longseq.distributed import all_groups, new_groups
from megatron.longseq.sharding.plan.collectives import Scope
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Level


class Communicators(NamedTuple):
    """This rank's place in its data-parallel group, and the process groups that collectives run on.

    Attributes:
        member: this rank's number in the data-parallel group.
        scopes: process groups for collectives alone: inside groups ordered by number, between groups ordered by group,
            flat in logical order. A group of one rank is not created.
        logical: all ranks of the data-parallel group in logical order, for other uses.
    """

    member: int
    scopes: Mapping[Scope, dist.ProcessGroup]
    logical: dist.ProcessGroup


def open_groups(
    data_parallel: dist.ProcessGroup, groups: RankGroups, timeout: timedelta | None = None
) -> Communicators:
    """Create the process groups of all data-parallel groups. Every rank of the job must call this at the same time.

    Args:
        data_parallel: this rank's data-parallel group (with context parallelism), in upstream's order.
        groups: how its ranks are grouped.
        timeout: after which an unfinished collective is an error; None: the backend's default.

    Raises:
        ValueError: the data-parallel group has another number of ranks than `groups`.
    """
    mine = dist.get_process_group_ranks(data_parallel)
    lists = all_groups(mine)
    everyone = [groups.ordered(members) for members in lists]
    rank_lists: dict[Scope, list[tuple[int, ...]]] = {
        Scope.FLAT: everyone,
        Scope.INSIDE: [ranks for members in lists for ranks in groups.inside(members)],
        Scope.BETWEEN: [ranks for members in lists for ranks in groups.between(members)],
    }

    def make(lists: Sequence[tuple[int, ...]], name: str) -> dist.ProcessGroup:
        return new_groups(lists, data_parallel, timeout, sort_ranks=False, group_desc=f"paro-{name}")

    logical = make(everyone, "logical")
    scopes = {scope: make(lists, scope) for scope, lists in rank_lists.items() if len(lists[0]) > 1}
    return Communicators(mine.index(dist.get_rank()), scopes, logical)


class OptimizerGroups(NamedTuple):
    """Process groups of this rank that the optimizer uses; collectives of buckets use none of them.

    Attributes:
        shards: ranks with different optimizer states, in the order of their shards.
        replicas: ranks with the same optimizer states; the rank in it is the number of this copy.
        statistics: ranks, over all model-parallel ones, that hold one copy together; norms are sums over them.
    """

    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup
    statistics: dist.ProcessGroup


def open_optimizer_groups(
    data_parallel: dist.ProcessGroup, groups: RankGroups, level: Level, timeout: timedelta | None = None
) -> OptimizerGroups:
    """Create the optimizer's process groups. Every rank of the job must call this at the same time.

    Args:
        data_parallel, groups, timeout: see `open_groups`.
        level: sharding level of the optimizer states.
    """
    lists = all_groups(dist.get_process_group_ranks(data_parallel))
    copies = [copies_of(members, groups, level) for members in lists]

    def make(rank_lists: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        return new_groups(rank_lists, data_parallel, timeout, sort_ranks=False)

    return OptimizerGroups(
        shards=make([ranks for each in copies for ranks in each]),
        replicas=make([ranks for each in copies for ranks in zip(*each, strict=True)]),
        statistics=make([sorted(sum(same, ())) for same in zip(*copies, strict=True)]),
    )


def copies_of(members: Sequence[int], groups: RankGroups, level: Level) -> list[tuple[int, ...]]:
    """Return the ranks that hold each copy of the optimizer states, in the order of their shards.

    Args:
        members: global ranks of the data-parallel group, in upstream's order.
        groups: the data-parallel ranks.
        level: level of the optimizer states.
    """
    if level is Level.GLOBAL:
        return [groups.ordered(members)]
    return list(groups.inside(members)) if level is Level.GROUP else [(rank,) for rank in members]
