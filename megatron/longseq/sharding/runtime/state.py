"""What the runtime of a job shares: the strategy, the ranks, the queues of collectives, and process groups."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.distributed import SentCounter
from megatron.longseq.sharding.plan.collectives import (
    BucketCollectives,
    FlatChooser,
    Scope,
    bucket_collectives,
    never_flat,
)
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Level, Strategy
from megatron.longseq.sharding.runtime.buffer_pool import BufferPool
from megatron.longseq.sharding.runtime.collectives import Region, region_of
from megatron.longseq.sharding.runtime.comm_queue import CommQueues
from megatron.longseq.sharding.runtime.process_groups import OptimizerGroups


@dataclass(frozen=True)
class ShardingState:
    """How model states are sharded in this job, and what runs their collectives.

    Attributes:
        strategy: the triplet.
        groups: the data-parallel ranks (times context-parallel ones) in groups.
        member: this rank's number among them, in upstream's order.
        queues: run collectives.
        optimizer_groups: process groups of the optimizer.
        is_flat: chooses between a flat collective and hierarchical ones; the same on all ranks.
        comm_dtype: communication dtype of gradients; None: the dtype in which they accumulate.
        passes: backward passes that make up a micro-batch (its segments).
        overlaps_grads: --overlap-grad-reduce.
        prefetch_units: units that are gathered besides the one that computes (--paro-prefetch-units); 0: without
            --paro-selective-overlap.
        sent: what this rank has sent.
        in_flight: `GradStore`s whose full bucket is being reduced, in order.
        copies_in_flight: `GradStore`s of which a copy of the sums is being sent in the communication dtype, in order.
        buffers: memory of full buckets and of copies in the communication dtype.
        initial: `ParamStore`s of parameters that are sharded and not yet in a bucket, while the model is built.
        initial_group: ranks whose initial values differ, so that those of the first one count; None: they do not.
    """

    strategy: Strategy
    groups: RankGroups
    member: int
    queues: CommQueues
    optimizer_groups: OptimizerGroups
    is_flat: FlatChooser = never_flat
    comm_dtype: torch.dtype | None = None
    passes: int = 1
    overlaps_grads: bool = False
    prefetch_units: int = 0
    sent: Mapping[Scope, SentCounter] = field(default_factory=dict)
    in_flight: deque[Any] = field(default_factory=deque)
    copies_in_flight: deque[Any] = field(default_factory=deque)
    buffers: BufferPool = field(default_factory=BufferPool)
    initial: dict[torch.nn.Parameter, Any] = field(default_factory=dict)
    initial_group: dist.ProcessGroup | None = None

    def bucket_collectives(self, size: int) -> BucketCollectives:
        """Return the collectives of a bucket of `size` bytes; a bucket calls this once, when it is made."""
        return bucket_collectives(self.strategy, self.groups, size, self.is_flat)

    def shard_range(self, level: Level, numel: int) -> range:
        """Return which elements of a bucket of `numel` elements this rank keeps of a state at a level.

        Args:
            level: level of the state.
            numel: elements of the bucket.
        """
        owned, shard = self.groups.owned(level, self.member), numel // self.groups.ranks
        return range(owned.start * shard, owned.stop * shard)

    def region(self, full: Tensor) -> Region:
        """Return a full bucket as collectives take it, with this rank's slice, 1/m of it.

        Args:
            full: [elements of the bucket].
        """
        return region_of(full, self.groups, self.member)

    def share_initial(self, full: Tensor) -> None:
        """Send the first rank's initial values of a full bucket to all ranks, if theirs differ.

        Args:
            full: [elements of the bucket], changed in place.
        """
        if self.initial_group is not None:
            dist.broadcast(full.view(torch.uint8), group=self.initial_group, group_src=0)


def cut(flat: Tensor, span: range, base: int = 0) -> Tensor:
    """Return the view of a bucket's elements `span` in a tensor whose first element is the bucket's element `base`.

    Args:
        flat: 1-D.
        span: elements of the bucket.
        base: element of the bucket at which `flat` begins.

    Returns:
        1-D view of `len(span)` elements.
    """
    return flat[span.start - base : span.stop - base]
