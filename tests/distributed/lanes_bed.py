"""Run collectives over real process groups, and compare results with plain sums and calls with counters."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.distributed import SentCounter
from megatron.longseq.sharding.plan.collectives import (
    SCATTER_INSIDE,
    Collective,
    CollectiveKind,
    CollectivesMode,
    Scope,
    full_collective,
)
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.runtime.collectives import CollectiveRunner, Region, region_of
from megatron.longseq.sharding.runtime.comm_queue import CommError, CommQueues
from megatron.longseq.sharding.runtime.gloo_ring import GlooRingRunner
from megatron.longseq.sharding.runtime.process_groups import Communicators, open_groups
from megatron.longseq.sharding.tools.probe_links import measure, probe, probe_this_job
from tests.regression.planted import wrapped

CPU = torch.device("cpu")


class Case(NamedTuple):
    """Collectives over all ranks."""

    kind: CollectiveKind
    mode: CollectivesMode
    size: int
    dtype: torch.dtype = torch.float32
    average: bool = False
    buckets: int = 3
    shard: int = 24
    is_whole: bool = True  # the data are small whole numbers
    lag: int = 1
    messages: bool = False  # rings of messages, else the backend's own collectives


class Result(NamedTuple):
    """The result of a case on one rank."""

    buckets: list[bytes]
    is_right: bool
    sent: dict[Scope, SentCounter]
    given: dict[Scope, SentCounter]


class Late:
    """Collectives that are late at random."""

    def __init__(self, inner: CollectiveRunner, seed: int) -> None:
        self.collectives, self.delays = inner, random.Random(seed)
        self.check = inner.check

    def run(self, collective: Collective, region: Region) -> None:
        """Run a phase, later."""
        time.sleep(self.delays.choice([0, 0, 0.002]))
        self.collectives.run(collective, region)


def begin() -> int:
    """Start gloo on this rank; return the rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank()


def contents(case: Case, number: int, ranks: int) -> Tensor:
    """Return [ranks, elements]: what every member has in a bucket."""
    generator = torch.Generator().manual_seed(1000 * number + 7)
    shape = (ranks, ranks * case.shard)
    if case.is_whole:
        return torch.randint(-8, 9, shape, generator=generator).to(case.dtype)
    return torch.randn(shape, generator=generator).to(case.dtype)


def expected(case: Case, groups: RankGroups, member: int, data: Tensor) -> tuple[slice, Tensor]:
    """Return which elements of a member's bucket are defined afterwards, and what they are."""
    logical = groups.logical(member)
    own = slice(logical * case.shard, (logical + 1) * case.shard)
    if case.kind is CollectiveKind.ALL_GATHER:
        shards = data.view(groups.ranks, groups.ranks, case.shard)
        return slice(None), torch.cat([shards[groups.member(place), place] for place in range(groups.ranks)])
    total = data.double().sum(0) / (groups.ranks if case.average else 1)
    where = own if case.kind is CollectiveKind.REDUCE_SCATTER else slice(None)
    return where, total[where].to(case.dtype)


@contextmanager
def given_to_torch(communicators: Communicators) -> Iterator[dict[Scope, SentCounter]]:
    """Count what collectives on the phases' groups are given: of n pieces all but one leave a rank."""
    given = {scope: SentCounter() for scope in Scope}
    scopes = {id(group): scope for scope, group in communicators.scopes.items()}

    def count(piece: Callable[..., int]) -> Callable[..., Any]:
        def call(original: Any, *args: Any, **named: Any) -> Any:
            ranks = named["group"].size()
            if id(named["group"]) in scopes:
                given[scopes[id(named["group"])]].count(piece(ranks, *args) * (ranks - 1))
            return original(*args, **named)

        return call

    with ExitStack() as stack:
        for name, piece in (
            ("all_gather_into_tensor", lambda ranks, more, less: less.nbytes),
            ("reduce_scatter_tensor", lambda ranks, less, more: less.nbytes),
            ("all_reduce", lambda ranks, tensor: 2 * (tensor.numel() // ranks) * tensor.element_size()),
        ):
            stack.enter_context(wrapped(dist, name, count(piece)))

        def isend(original: Any, tensor: Tensor, peer: int, group: Any) -> Any:
            given[scopes[id(group)]].bytes += tensor.nbytes
            return original(tensor, peer, group=group)

        stack.enter_context(wrapped(dist, "isend", isend))
        yield given


def collect(cases: Sequence[Case]) -> list[Result]:
    """Run cases on this rank, late at random, while it uses other groups itself."""
    rank = begin()
    opened = {
        size: open_groups(dist.group.WORLD, RankGroups(dist.get_world_size(), size))
        for size in sorted({case.size for case in cases})
    }
    results = [_collect(case, opened[case.size], random.Random(100 * index + rank)) for index, case in enumerate(cases)]
    dist.destroy_process_group()
    return results


def _collect(case: Case, communicators: Communicators, late: random.Random) -> Result:
    groups, member = RankGroups(dist.get_world_size(), case.size), communicators.member
    collectives = full_collective(case.kind, groups, case.mode)
    kind = GlooRingRunner if case.messages else CollectiveRunner
    inner = kind(groups, communicators, average=case.average)
    runner = Late(inner, late.randrange(1000))
    overlapped = case.mode is CollectivesMode.OVERLAPPED
    data = [contents(case, number, groups.ranks) for number in range(case.buckets)]
    buckets = [each[member].clone() for each in data]
    if case.kind is CollectiveKind.ALL_GATHER:
        shard = slice(groups.logical(member) * case.shard, (groups.logical(member) + 1) * case.shard)
        for bucket in buckets:
            own = bucket[shard].clone()
            bucket.fill_(torch.nan)[shard] = own
    is_right = True
    with (
        given_to_torch(communicators) as given,
        closing(CommQueues(runner, CPU, member, is_overlapped=overlapped, lag=case.lag)) as lanes,
    ):
        handles = []
        for number, bucket in enumerate(buckets):
            time.sleep(late.choice([0, 0, 0.003]))
            handles.append(lanes.submit(collectives, region_of(bucket, groups, member), f"bucket {number}"))
            for group in (dist.group.WORLD, communicators.logical):
                mine = torch.full((2048,), float(member + number))
                dist.all_reduce(mine, group=group)
                is_right &= bool((mine == sum(range(groups.ranks)) + groups.ranks * number).all())
        for handle in handles:
            handle.wait()
    results = []
    for bucket, each in zip(buckets, data, strict=True):
        where, right = expected(case, groups, member, each)
        is_right &= not case.is_whole or torch.equal(bucket[where], right)
        results.append(bucket[where].view(torch.uint8).numpy().tobytes())
    return Result(results, is_right, dict(inner.sent), given)


def places(lists: Sequence[Sequence[int]], size: int) -> tuple[int, int, int, dict[str, list[int]]]:
    """Return a rank's member number, its logical rank and its group's, and its process groups, among several groups."""
    rank = begin()
    mine = None
    for ranks in lists:
        group = dist.new_group(list(ranks))
        mine = group if rank in ranks else mine
    assert mine is not None
    groups = RankGroups(mine.size(), size)
    made = open_groups(mine, groups)
    assert made.logical not in made.scopes.values(), "two threads would use one group"
    named = {str(scope): dist.get_process_group_ranks(group) for scope, group in made.scopes.items()}
    for group in (*made.scopes.values(), made.logical):
        dist.barrier(group)
    dist.destroy_process_group()
    return made.member, made.logical.rank(), groups.logical(made.member), named


def run_without_one_rank() -> tuple[str, float]:
    """Return what the other rank's lanes say, and after how long."""
    rank, groups = begin(), RankGroups(2, 2)
    communicators = open_groups(dist.group.WORLD, groups, timedelta(seconds=1))
    message, began = "", time.monotonic()
    if rank == 0:
        lanes = CommQueues(CollectiveRunner(groups, communicators), CPU, rank, is_overlapped=True)
        handle = lanes.submit((SCATTER_INSIDE,), region_of(torch.zeros(8), groups, 0), "bucket 5 of gradients")
        try:
            handle.wait()
        except CommError as error:
            message = str(error)
    seconds = time.monotonic() - began
    dist.barrier()
    return message, seconds


def probed(size: int) -> tuple[Any, Any, float]:
    """Return links as this rank's group measures them, times of a scatter, and how long the first took."""
    begin()
    groups = RankGroups(dist.get_world_size(), size)
    communicators = open_groups(dist.group.WORLD, groups)
    dist.barrier()
    began = time.monotonic()
    links = probe(groups, communicators, CPU)
    seconds = time.monotonic() - began
    timed = measure(
        groups, communicators, CPU, kind=CollectiveKind.REDUCE_SCATTER, sizes=(2**12, 2**14, 2**26), budget=0.001
    )
    dist.destroy_process_group()
    return links, timed, seconds


def probed_flag(size: int | None) -> str | None:
    """Return what the `probe` command prints on this rank."""
    torch.set_num_threads(1)
    return probe_this_job(size)
