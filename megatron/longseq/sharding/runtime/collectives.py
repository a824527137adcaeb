"""Run one collective of a bucket on process groups: in place, on contiguous memory, with its bytes counted.

A bucket is cut into shards by logical rank (`rank_groups`), so everything that a collective reads and writes is
contiguous: a reduce-scatter leaves a rank's shard where the next collective expects it.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from megatron.longseq.distributed import SentCounter
from megatron.longseq.sharding.plan.collectives import Collective, CollectiveKind, Scope
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.runtime.process_groups import Communicators


class Region(NamedTuple):
    """The memory of a bucket that collectives work on in place.

    Attributes:
        full: [n * shard] the whole bucket; None if every collective runs between groups.
        group_slice: [G * shard] shards i * G to (i + 1) * G for a rank of number i, a view into `full` if that is
            given. Shard k of it belongs to the rank of this number in group k.
    """

    full: Tensor | None
    group_slice: Tensor


def region_of(full: Tensor, groups: RankGroups, member: int) -> Region:
    """Return a bucket of n equal shards as the region of a member; sizes are checked when it is used.

    Args:
        full: [elements of the bucket].
        groups: the data-parallel ranks.
        member: data-parallel rank, as upstream numbers it.
    """
    width = full.numel() // groups.size
    return Region(full, full.narrow(0, member % groups.size * width, width))


class CollectiveRunner:
    """Runs collectives with torch.distributed, one at a time on each process group.

    Args:
        groups: the data-parallel ranks.
        communicators: this rank's process groups.
        average: whether reductions divide by the number of ranks that take part.
    """

    def __init__(self, groups: RankGroups, communicators: Communicators, *, average: bool = False) -> None:
        self._groups, self._communicators = groups, communicators
        self._group, self._number = divmod(communicators.member, groups.size)
        self._op = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
        self._sent = {scope: SentCounter() for scope in Scope}

    @property
    def sent(self) -> Mapping[Scope, SentCounter]:
        """What this rank has sent, counted as rings: all but one of n pieces, twice that for an all-reduce."""
        return self._sent

    def check(self, collective: Collective, region: Region) -> None:
        """Check that a collective can run on a region.

        Args:
            collective: what is to run.
            region: this rank's memory of the bucket.

        Raises:
            ValueError: sizes do not fit, the slice is not a view at the right place, or there is no process group.
        """
        wrong = next(self._faults(collective, region), None)
        if wrong is not None:
            size, count = self._groups.size, self._groups.count
            raise ValueError(
                f"{collective.kind} {collective.scope}, data-parallel rank {self._communicators.member} of "
                f"{self._groups.ranks} in {count} groups of {size}: {wrong}"
            )

    def run(self, collective: Collective, region: Region) -> None:
        """Run a collective in place; on a GPU, in the current stream.

        Args:
            collective: what runs; all ranks of its group run the same.
            region: this rank's memory of the bucket.

        Raises:
            ValueError: see `check`.
        """
        self.check(collective, region)
        self._sent[collective.scope].count(self._send(collective, region))

    def _send(self, collective: Collective, region: Region) -> int:
        """Run a collective; return the bytes that this rank sends, counted as a ring."""
        group = self._communicators.scopes[collective.scope]
        joined, own = self._tensors(collective.scope, region)
        if collective.kind is CollectiveKind.ALL_GATHER:
            dist.all_gather_into_tensor(joined, own, group=group)
        elif collective.kind is CollectiveKind.REDUCE_SCATTER:
            dist.reduce_scatter_tensor(own, joined, op=self._op, group=group)
        else:
            dist.all_reduce(joined, op=self._op, group=group)
        times = 2 if collective.kind is CollectiveKind.ALL_REDUCE else 1
        return joined.nbytes // group.size() * (group.size() - 1) * times

    def _tensors(self, scope: Scope, region: Region) -> tuple[Tensor, Tensor]:
        """Return what the ranks of a scope have together, and this rank's own piece of it."""
        shard = region.group_slice.numel() // self._groups.count
        own = region.group_slice.narrow(0, self._group * shard, shard)
        if scope is Scope.BETWEEN:
            return region.group_slice, own
        assert region.full is not None, "checked"
        return region.full, region.group_slice if scope is Scope.INSIDE else own

    def _faults(self, collective: Collective, region: Region) -> Iterator[str]:
        """Yield what is wrong; later checks rely on the earlier ones."""
        full, piece = region
        if any(tensor.dim() != 1 or not tensor.is_contiguous() for tensor in (full, piece) if tensor is not None):
            yield "a tensor is not flat and contiguous: give views of a bucket's buffer"
        if collective.scope not in self._communicators.scopes:
            yield "there is no process group for it, as a group of one rank is not created: use `nontrivial`"
        if piece.numel() % self._groups.count:
            yield f"a slice of {piece.numel()} elements does not split into {self._groups.count} shards: pad the bucket"
        if full is None:
            if collective.scope is not Scope.BETWEEN:
                yield "it works on the full bucket, and only a slice is given"
            return
        if full.numel() != piece.numel() * self._groups.size or full.dtype != piece.dtype:
            yield (
                f"{piece.numel()} {piece.dtype} elements are no slice, 1/{self._groups.size}, of a bucket of "
                f"{full.numel()} {full.dtype}: pad the bucket to shards of one size"
            )
        if piece.data_ptr() != full.data_ptr() + self._number * piece.nbytes:
            yield f"the slice is not slice {self._number} of the bucket: give a view into it"
