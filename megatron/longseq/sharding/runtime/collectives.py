"""One phase of a bucket on process groups: in place, counted, on the bytes that `phases` names; and making the groups.

A bucket is cut by logical rank (`groups`), so all that a phase reads and writes is contiguous: a reduce-scatter leaves
a rank's part where the next phase looks for it, and a gather starts from there.
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from megatron.longseq.distributed import SentCounter, all_groups, same_backend_options
from megatron.longseq.sharding.plan.collectives import Kind, Phase, Scope
from megatron.longseq.sharding.plan.rank_groups import Groups


class Region(NamedTuple):
    """A bucket on a rank: 1-D contiguous tensors that phases work on in place.

    Attributes:
        whole: n shards; None where every phase is between groups.
        part: number i's slice, shards i * G to (i + 1) * G, a view into `whole` where that is given. Piece k of it is
            the shard of this rank, which is in group k.
    """

    whole: Tensor | None
    part: Tensor


def region_of(whole: Tensor, groups: Groups, member: int) -> Region:
    """Return a whole bucket of n equal shards as a rank's region; sizes are checked when it is used."""
    width = whole.numel() // groups.size
    return Region(whole, whole.narrow(0, member % groups.size * width, width))


class Communicators(NamedTuple):
    """A rank's place in its data-parallel group, and process groups of that.

    Attributes:
        member: this rank, as the data-parallel group numbers it.
        scopes: communicators of the phases alone: inside by number, between by group, flat by logical rank. One of a
            single rank is not made.
        logical: all ranks by logical rank once more, for whoever else needs that order.
    """

    member: int
    scopes: Mapping[Scope, dist.ProcessGroup]
    logical: dist.ProcessGroup


def open_groups(data_parallel: dist.ProcessGroup, groups: Groups, timeout: timedelta | None = None) -> Communicators:
    """Make the process groups of all data-parallel groups; every rank of the job calls this at the same time.

    Args:
        data_parallel: this rank's (with context parallelism: of both), in upstream's order.
        groups: how its ranks are grouped.
        timeout: after which a collective that does not end is an error; None: the backend's own.

    Raises:
        ValueError: the data-parallel group has another number of ranks.
    """
    mine, backend = tuple(dist.get_process_group_ranks(data_parallel)), dist.get_backend(data_parallel)
    me, scopes, logical = dist.get_rank(), {}, None
    for members in all_groups(mine):
        everyone = groups.ordered(members)
        wanted: list[tuple[Scope | None, tuple[int, ...]]] = [(None, everyone), (Scope.FLAT, everyone)]
        wanted += [(Scope.INSIDE, ranks) for ranks in groups.inside(members)]
        wanted += [(Scope.BETWEEN, ranks) for ranks in groups.between(members)]
        for scope, ranks in wanted:  # torch wants every rank of the job at the making of every group
            if scope is not None and len(ranks) == 1:
                continue
            name = f"paro-{scope or 'logical'}"
            made = dist.new_group(
                list(ranks), timeout, backend, same_backend_options(data_parallel), sort_ranks=False, group_desc=name
            )
            if me in ranks and scope is None:
                logical = made
            elif me in ranks and scope is not None:
                scopes[scope] = made
    assert logical is not None, "this rank's own group is among everyone's"
    return Communicators(mine.index(me), scopes, logical)


class Collectives:
    """Runs phases, one at a time per process group.

    Args:
        groups: the data-parallel ranks.
        communicators: this rank's.
        average: reduce to the mean of the ranks that take part, else to the sum.
    """

    def __init__(self, groups: Groups, communicators: Communicators, *, average: bool = False) -> None:
        self._groups, self._communicators = groups, communicators
        self._group, self._number = divmod(communicators.member, groups.size)
        self._op = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
        self._sent = {scope: SentCounter() for scope in Scope}

    @property
    def sent(self) -> Mapping[Scope, SentCounter]:
        """What this rank has sent, as rings send it: of n pieces all but one, twice that for an all-reduce."""
        return self._sent

    def check(self, phase: Phase, region: Region) -> None:
        """Say whether a phase can run on a region.

        Raises:
            ValueError: sizes do not fit, the part is elsewhere than in the whole, or no process group runs the phase.
        """
        wrong = next(self._faults(phase, region), None)
        if wrong is not None:
            size, count = self._groups.size, self._groups.count
            raise ValueError(
                f"{phase.kind} {phase.scope}, data-parallel rank {self._communicators.member} of {self._groups.ranks} "
                f"in {count} groups of {size}: {wrong}"
            )

    def run(self, phase: Phase, region: Region) -> None:
        """Run a phase in place; on a GPU, in the current stream.

        Raises:
            ValueError: see `check`.
        """
        self.check(phase, region)
        self._sent[phase.scope].count(self._send(phase, region))

    def _send(self, phase: Phase, region: Region) -> int:
        """Run a phase; return the bytes that this rank sends, as rings send them."""
        group = self._communicators.scopes[phase.scope]
        more, less = self._tensors(phase.scope, region)
        if phase.kind is Kind.ALL_GATHER:
            dist.all_gather_into_tensor(more, less, group=group)
        elif phase.kind is Kind.REDUCE_SCATTER:
            dist.reduce_scatter_tensor(less, more, op=self._op, group=group)
        else:
            dist.all_reduce(more, op=self._op, group=group)
        times = 2 if phase.kind is Kind.ALL_REDUCE else 1
        return more.nbytes // group.size() * (group.size() - 1) * times

    def _tensors(self, scope: Scope, region: Region) -> tuple[Tensor, Tensor]:
        """Return what a scope's ranks have together, and this rank's own piece of that."""
        shard = region.part.numel() // self._groups.count
        own = region.part.narrow(0, self._group * shard, shard)
        if scope is Scope.BETWEEN:
            return region.part, own
        assert region.whole is not None, "checked"
        return region.whole, region.part if scope is Scope.INSIDE else own

    def _faults(self, phase: Phase, region: Region) -> Iterator[str]:
        """Yield what is wrong; what comes after a fault relies on its absence."""
        whole, part = region
        if any(tensor.dim() != 1 or not tensor.is_contiguous() for tensor in (whole, part) if tensor is not None):
            yield "a tensor is not flat and contiguous: give views of a bucket's buffer"
        if phase.scope not in self._communicators.scopes:
            yield "no process group runs it, as one of a single rank is not made: take phases from `needed`"
        if part.numel() % self._groups.count:
            yield f"a slice of {part.numel()} elements does not split into {self._groups.count} shards: pad the bucket"
        if whole is None:
            if phase.scope is not Scope.BETWEEN:
                yield "it works on the whole bucket, and only a slice is given"
            return
        if whole.numel() != part.numel() * self._groups.size or whole.dtype != part.dtype:
            yield (
                f"{part.numel()} {part.dtype} elements are no slice, 1/{self._groups.size}, of a bucket of "
                f"{whole.numel()} {whole.dtype}: pad the bucket to shards of one size"
            )
        if part.data_ptr() != whole.data_ptr() + self._number * part.nbytes:
            yield f"the slice is not slice {self._number} of the bucket: give a view into it"
