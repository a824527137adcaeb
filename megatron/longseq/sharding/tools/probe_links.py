"""Measure the speed of links, and print the --paro-links to give: `torchrun ... -m megatron.longseq.sharding probe`.

All ranks time collectives of a few sizes together. The speeds are those at which rings of messages would take these
times: seconds per message are a latency plus bytes over a bandwidth.
"""

import os
import time
from collections.abc import Callable, Sequence
from math import inf, log
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron.longseq.sharding.plan.collectives import Collective, CollectiveKind, Scope, nontrivial
from megatron.longseq.sharding.plan.flat_or_hierarchical import GIGABYTE
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import LinkSpeed, LinkSpeeds
from megatron.longseq.sharding.runtime.collectives import CollectiveRunner, region_of
from megatron.longseq.sharding.runtime.gloo_ring import runner_for
from megatron.longseq.sharding.runtime.process_groups import Communicators, open_groups

SIZES = (2**16, 2**19, 2**22, 2**25)  # bytes of a bucket
REPEATS = 5
BUDGET = 0.02  # seconds for one size of one collective


class Measurement(NamedTuple):
    """The time of a collective.

    Attributes:
        collective: what ran.
        shard: bytes of one of the bucket's n shards.
        seconds: that it took.
    """

    collective: Collective
    shard: int
    seconds: float


def fit_link(groups: RankGroups, measurements: Sequence[Measurement]) -> LinkSpeed | None:
    """Return the link speed that explains the times with the least relative errors; None if there are none.

    Args:
        groups: the data-parallel ranks.
        measurements: times of collectives that all use this link.

    Raises:
        ValueError: a time is not positive.
    """
    points = [
        (one.collective.shards_per_message(groups) * one.shard, one.seconds / one.collective.steps(groups))
        for one in measurements
        if one.collective.steps(groups)
    ]
    if not points:
        return None
    if min(seconds for _, seconds in points) <= 0:
        raise ValueError(f"collectives took {[one.seconds for one in measurements]} s: times must be positive")
    # Minimise the squares of 1 - (latency + size / bandwidth) / time, linear in u = 1 / time and v = size / time.
    u, v = [1 / seconds for _, seconds in points], [size / seconds for size, seconds in points]
    uu, uv, vv = (sum(a * b for a, b in zip(x, y, strict=True)) for x, y in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    latency, per_byte = 0.0, sum(v) / vv
    if len({size for size, _ in points}) > 1:
        latency = (sum(u) * vv - sum(v) * uv) / determinant
        per_byte = (sum(v) * uu - sum(u) * uv) / determinant
    if latency < 0:
        latency, per_byte = 0.0, sum(v) / vv
    if per_byte <= 0:
        latency, per_byte = sum(u) / uu, 0.0
    return LinkSpeed(1 / per_byte if per_byte else inf, latency)


def fit_links(groups: RankGroups, measurements: Sequence[Measurement]) -> LinkSpeeds:
    """Return the link speeds that explain the times.

    The number of links over which a flat ring leaves a group is the one that explains the flat collectives' times best;
    the smallest of equally good ones. A link over which nothing was sent is infinitely fast.

    Args:
        groups: the data-parallel ranks.
        measurements: times of collectives of all scopes.
    """
    scoped = {scope: [one for one in measurements if one.collective.scope is scope] for scope in Scope}
    inside, between = (fit_link(groups, scoped[scope]) or LinkSpeed(inf) for scope in (Scope.INSIDE, Scope.BETWEEN))
    candidates = [LinkSpeeds(inside, between, channels) for channels in range(1, groups.size + 1)]
    return min(candidates, key=lambda links: log_error(groups, links, scoped[Scope.FLAT]))


def log_error(groups: RankGroups, links: LinkSpeeds, measurements: Sequence[Measurement]) -> float:
    """Return the error of predicted times: the mean square of the logarithms of predicted over measured.

    Args:
        groups: the data-parallel ranks.
        links: speeds to judge.
        measurements: measured times.
    """
    predicted = [links.seconds(one.collective, groups, one.shard) for one in measurements]
    ratios = [seconds / one.seconds for seconds, one in zip(predicted, measurements, strict=True) if seconds]
    return sum(log(ratio) ** 2 for ratio in ratios) / max(len(ratios), 1)


def measure(
    groups: RankGroups,
    communicators: Communicators,
    device: torch.device,
    *,
    kind: CollectiveKind = CollectiveKind.ALL_GATHER,
    sizes: Sequence[int] = SIZES,
    budget: float = BUDGET,
) -> tuple[Measurement, ...]:
    """Time a collective inside groups, between them and over all ranks. All ranks call this together.

    Where the ranks of a node share a link, each gets its share. Nothing else may use the communicators meanwhile.

    Args:
        groups: the ranks.
        communicators: of this rank.
        device: of the buckets.
        kind: of the collective.
        sizes: bytes of the buckets, increasing; the first two are always timed, further ones if they fit the budget.
        budget: seconds for one size.

    Returns:
        Median times of the slowest rank, the same on all ranks.
    """
    runner = runner_for(groups, communicators)
    measurements: list[Measurement] = []
    scopes = (Scope.INSIDE, Scope.BETWEEN, Scope.FLAT)
    for collective in nontrivial(tuple(Collective(kind, scope) for scope in scopes), groups):
        once = _timer(groups, communicators, runner, device, collective)
        for _ in range(2):
            once(sizes[0])  # the first collectives make connections
        last = 0.0
        for index, size in enumerate(sizes):
            if index >= 2 and last * size / sizes[index - 1] > budget:
                break
            first = _slowest(once(size), device)
            repeats = min(REPEATS, max(1, int(budget / first)))
            last = _slowest(median(once(size) for _ in range(repeats)), device)
            measurements.append(Measurement(collective, _shard(size, groups) * 4, last))
    return tuple(measurements)


def probe(groups: RankGroups, communicators: Communicators, device: torch.device) -> LinkSpeeds:
    """Return the link speeds that all ranks measure together, the same on each of them.

    Args:
        groups: the data-parallel ranks.
        communicators: this rank's process groups.
        device: device of the tensors that are sent.
    """
    return fit_links(groups, measure(groups, communicators, device))


def flag_of(links: LinkSpeeds) -> str:
    """Return the flag that gives a training run these speeds; an unused link counts as fast as the other one."""
    speeds = [link.bandwidth / GIGABYTE for link in (links.inside, links.between)]
    finite = [speed for speed in speeds if speed < inf] or [1.0]
    return "--paro-links " + " ".join(f"{speed if speed < inf else max(finite):.3g}" for speed in speeds)


def probe_this_job(group_size: int | None) -> str | None:
    """Measure the links between the ranks that torchrun has started.

    Args:
        group_size: ranks in a group; None: those of a node.

    Returns:
        The flag to give and the links as fitted, on the first rank; None on the others.

    Raises:
        ValueError: torchrun has not started this process, or the group size does not divide the ranks.
    """
    if "RANK" not in os.environ:
        raise ValueError("run probe on all ranks of a job: torchrun ... -m megatron.longseq.sharding probe")
    groups = RankGroups(int(os.environ["WORLD_SIZE"]), group_size or int(os.environ["LOCAL_WORLD_SIZE"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        assert dist.group.WORLD is not None
        links = probe(groups, open_groups(dist.group.WORLD, groups), device)
        if dist.get_rank() != 0:
            return None
    finally:
        dist.destroy_process_group()
    latencies = f"{links.inside.latency * 1e6:.3g} and {links.between.latency * 1e6:.3g} us a message"
    return f"{flag_of(links)}\n# {latencies}; a flat ring leaves a group over the links of {links.channels} rank(s)"


def _shard(size: int, groups: RankGroups) -> int:
    """Return the float32 elements of a shard of a bucket of `size` bytes."""
    return max(1, size // 4 // groups.ranks)


def _timer(
    groups: RankGroups,
    communicators: Communicators,
    runner: CollectiveRunner,
    device: torch.device,
    collective: Collective,
) -> Callable[[int], float]:
    """Return a function that runs a collective on a bucket of given bytes and returns this rank's seconds."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def once(size: int) -> float:
        bucket = torch.zeros(_shard(size, groups) * groups.ranks, device=device)
        region = region_of(bucket, groups, communicators.member)
        synchronize()
        begin = time.perf_counter()
        runner.run(collective, region)
        synchronize()
        return time.perf_counter() - begin

    return once


def _slowest(seconds: float, device: torch.device) -> float:
    """Return the largest of all ranks' values; the ranks continue together."""
    slowest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.item())
