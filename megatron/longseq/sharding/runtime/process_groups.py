"""Process groups that upstream's optimizer works with, under a strategy."""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from megatron.longseq.distributed import all_groups
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.strategy import Level


class OptimizerGroups(NamedTuple):
    """Groups of this rank; none of them is one that lanes use.

    Attributes:
        shards: ranks that hold different optimizer states, in the order of their shards.
        replicas: ranks that hold the same; its rank is which copy this is.
        statistics: ranks, of all model-parallel ones, that hold one copy together: norms are sums over them.
    """

    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup
    statistics: dist.ProcessGroup


def open_optimizer_groups(
    data_parallel: dist.ProcessGroup, groups: Groups, level: Level, timeout: timedelta | None = None
) -> OptimizerGroups:
    """Make them; every rank of the job calls this at the same time.

    Args:
        data_parallel: this rank's (with context parallelism: of both), in upstream's order.
        groups: how its ranks are grouped.
        level: over which ranks optimizer states are sharded.
        timeout: after which a collective that does not end is an error; None: the backend's own.
    """
    lists, backend = all_groups(dist.get_process_group_ranks(data_parallel)), dist.get_backend(data_parallel)
    copies = [copies_of(members, groups, level) for members in lists]

    def make(ranks: Sequence[int]) -> dist.ProcessGroup | None:
        made = dist.new_group(list(ranks), timeout=timeout, backend=backend, sort_ranks=False)
        return made if dist.get_rank() in ranks else None

    def mine(wanted: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        return next(group for group in [make(ranks) for ranks in wanted] if group is not None)

    return OptimizerGroups(
        shards=mine([ranks for each in copies for ranks in each]),
        replicas=mine([ranks for each in copies for ranks in zip(*each, strict=True)]),
        statistics=mine([sorted(sum(same, ())) for same in zip(*copies, strict=True)]),
    )


def copies_of(members: Sequence[int], groups: Groups, level: Level) -> list[tuple[int, ...]]:
    """Return the ranks that hold each copy of the optimizer states, in the order of their shards."""
    if level is Level.GLOBAL:
        return [groups.ordered(members)]
    return list(groups.inside(members)) if level is Level.GROUP else [(rank,) for rank in members]
