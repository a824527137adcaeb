"""What the runtime shares: the strategy, the ranks, the lanes that run collectives, and what they send."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.distributed import SentCounter
from megatron.longseq.sharding.plan.collectives import Decide, Phases, Scope, chosen
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.strategy import Level, Strategy
from megatron.longseq.sharding.runtime.collectives import Region
from megatron.longseq.sharding.runtime.comm_queue import Lanes


@dataclass(frozen=True)
class Sharding:
    """How model states are sharded in this job.

    Attributes:
        strategy: the triplet.
        groups: the data-parallel ranks (with context parallelism: both together) in groups.
        member: this rank among them, as upstream numbers it.
        lanes: run collectives.
        is_flat: whether to run phases of a bucket, which are one flat collective, over all ranks at once; given the
            flat phases and the bucket's bytes. Alike on all ranks.
        wire: type of gradients on the wire; None: that in which they accumulate.
        passes: backward passes that make up a micro-batch: its segments.
        overlaps_grads: --overlap-grad-reduce.
        sent: what this rank has sent.
        in_flight: buckets whose scratch is on the wire (`GradStore`), in order.
        copies: jobs that send copies of sums in the type of the wire, in order.
    """

    strategy: Strategy
    groups: Groups
    member: int
    lanes: Lanes
    is_flat: Decide
    wire: torch.dtype | None = None
    passes: int = 1
    overlaps_grads: bool = False
    sent: Mapping[Scope, SentCounter] = field(default_factory=dict)
    in_flight: deque[Any] = field(default_factory=deque)
    copies: deque[Any] = field(default_factory=deque)

    def phases(self, term: str, size: int) -> Phases:
        """Return the phases of a term of `Program`, for a bucket of some bytes."""
        return chosen(self.strategy, self.groups, term, size, self.is_flat)

    def span(self, level: Level, numel: int) -> range:
        """Return which elements of a bucket this rank holds of a state at a level."""
        owned, shard = self.groups.owned(level, self.member), numel // self.groups.ranks
        return range(owned.start * shard, owned.stop * shard)

    def region(self, whole: Tensor) -> Region:
        """Return a whole bucket as collectives take it: with this rank's slice, 1/m of it."""
        return Region(whole, cut(whole, self.span(Level.GROUP, whole.numel())))


def cut(flat: Tensor, span: range, base: int = 0) -> Tensor:
    """Return a view of elements of a bucket, in a tensor that begins at the bucket's element `base`."""
    return flat[span.start - base : span.stop - base]
