"""How fast links are, measured when a job starts: collectives of a few sizes, timed alike by all ranks."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist

from megatron.longseq.sharding.plan.collectives import Kind, Phase, Scope, needed
from megatron.longseq.sharding.plan.linkfit import Timed, fit_links
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.time_model import Links
from megatron.longseq.sharding.runtime.collectives import Collectives, Communicators, region_of
from megatron.longseq.sharding.runtime.gloo_ring import runner_for

SIZES = (2**16, 2**19, 2**22, 2**25)  # bytes of a bucket
REPEATS = 5
BUDGET = 0.02  # seconds for one size of one collective


def measure(
    groups: Groups,
    communicators: Communicators,
    device: torch.device,
    *,
    kind: Kind = Kind.ALL_GATHER,
    sizes: Sequence[int] = SIZES,
    budget: float = BUDGET,
) -> tuple[Timed, ...]:
    """Time a collective inside groups, between them and over all ranks; the same figures on all ranks of the job.

    All ranks call this at the same time, so where those of a node share a link, each gets its share. The caller is
    alone on the communicators: lanes do not run yet.

    Args:
        groups: the data-parallel ranks.
        communicators: this rank's.
        device: where collectives work.
        kind: what is timed.
        sizes: bytes of buckets, rising; at least the first two are timed, and others that fit the budget.
        budget: seconds for one size.

    Returns:
        Medians, of the slowest rank.
    """
    collectives = runner_for(groups, communicators)
    timed: list[Timed] = []
    for phase in needed(tuple(Phase(kind, scope) for scope in (Scope.INSIDE, Scope.BETWEEN, Scope.FLAT)), groups):
        once = _timer(groups, communicators, collectives, device, phase)
        for _ in range(2):
            once(sizes[0])  # a first collective makes connections
        last = 0.0
        for index, size in enumerate(sizes):
            if index >= 2 and last * size / sizes[index - 1] > budget:
                break
            first = _agree(once(size), device)
            repeats = min(REPEATS, max(1, int(budget / first)))
            last = _agree(median(once(size) for _ in range(repeats)), device)
            timed.append(Timed(phase, _shard(size, groups) * 4, last))
    return tuple(timed)


def probe(groups: Groups, communicators: Communicators, device: torch.device) -> Links:
    """Return the speed of links as all ranks of the job measure it together, the same on each."""
    return fit_links(groups, measure(groups, communicators, device))


def _shard(size: int, groups: Groups) -> int:
    """Return elements of a shard."""
    return max(1, size // 4 // groups.ranks)


def _timer(
    groups: Groups, communicators: Communicators, collectives: Collectives, device: torch.device, phase: Phase
) -> Callable[[int], float]:
    """Return a function that runs a phase on a bucket of some bytes, and returns the seconds it took this rank."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def once(size: int) -> float:
        bucket = torch.zeros(_shard(size, groups) * groups.ranks, device=device)
        region = region_of(bucket, groups, communicators.member)
        settle()
        begin = time.perf_counter()
        collectives.run(phase, region)
        settle()
        return time.perf_counter() - begin

    return once


def _agree(seconds: float, device: torch.device) -> float:
    """Return the slowest rank's time, on all ranks of the job; they go on together.

    Those of other data-parallel groups, too: parameters that tensor-parallel ranks all have are summed alike there.
    """
    slowest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.item())
