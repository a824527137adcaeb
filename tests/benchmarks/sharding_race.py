"""The ranks' side of the race of collectives: flat, serial hierarchical and overlapped, in turns, in one job.

Messages travel in two ways. "gloo": gloo's own collectives, as the runtime calls them. "ring": every message of
`ring.ring_steps`, sent one by one, as the runtime does on gloo; flat, serial and overlapped then differ in nothing but
their order.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.sharding.plan.collectives import CollectiveKind, CollectivesMode, full_collective
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import LinkSpeeds
from megatron.longseq.sharding.runtime.collectives import CollectiveRunner, region_of
from megatron.longseq.sharding.runtime.comm_queue import CommQueues
from megatron.longseq.sharding.runtime.gloo_ring import GlooRingRunner
from megatron.longseq.sharding.runtime.process_groups import open_groups
from megatron.longseq.sharding.tools.probe_links import probe

GLOO, RING = "gloo", "ring"


class Arm(NamedTuple):
    """One way to run a collective.

    Attributes:
        way: GLOO or RING.
        mode: flat, hierarchical or overlapped.
        buckets: into which the message is cut.
    """

    way: str
    mode: CollectivesMode
    buckets: int


class Heat(NamedTuple):
    """A collective of some bytes, and the arms that run it, each so many times."""

    kind: CollectiveKind
    size: int
    arms: tuple[Arm, ...]
    rounds: int


@dataclass
class Timed:
    """Seconds of every round of an arm, on one rank.

    Attributes:
        heat: which collective.
        arm: which way.
        seconds: by round.
    """

    heat: Heat
    arm: Arm
    seconds: list[float]


def probe_on_this_rank(size: int) -> LinkSpeeds:
    """Measure links as `python -m megatron.longseq.sharding probe` does; all ranks return the same.

    Args:
        size: of a group.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = RankGroups(dist.get_world_size(), size)
    return probe(groups, open_groups(dist.group.WORLD, groups), torch.device("cpu"))


def race_on_this_rank(size: int, heats: Sequence[Heat]) -> list[Timed]:
    """Run every heat, its arms in turns, each round in another order; before that each once, its result looked at.

    Args:
        size: of a group.
        heats: what to run.

    Raises:
        ValueError: a wrong result.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return Race(RankGroups(dist.get_world_size(), size)).run(heats)


class Track(NamedTuple):
    """What an arm runs on.

    Attributes:
        groups: how ranks are grouped, and so in which order shards lie.
        lanes: run phases.
    """

    groups: RankGroups
    lanes: CommQueues


class Race:
    """Holds a rank's process groups and lanes.

    Args:
        groups: all ranks.
    """

    def __init__(self, groups: RankGroups) -> None:
        self.member = dist.get_rank()
        alone = RankGroups(
            groups.ranks, groups.ranks
        )  # --paro-collectives flat: no groups, so shards lie in ranks' order
        made, natural = open_groups(dist.group.WORLD, groups), open_groups(dist.group.WORLD, alone)
        gloo, ring = CollectiveRunner(groups, made), GlooRingRunner(groups, made)
        self.tracks = {
            (GLOO, CollectivesMode.FLAT): self._track(alone, CollectiveRunner(alone, natural), CollectivesMode.FLAT),
        }
        for mode in CollectivesMode:
            self.tracks.setdefault((GLOO, mode), self._track(groups, gloo, mode))
            self.tracks[RING, mode] = self._track(groups, ring, mode)

    def _track(self, groups: RankGroups, runner: CollectiveRunner, mode: CollectivesMode) -> Track:
        is_overlapped = mode is CollectivesMode.OVERLAPPED
        return Track(groups, CommQueues(runner, torch.device("cpu"), self.member, is_overlapped=is_overlapped))

    def run(self, heats: Sequence[Heat]) -> list[Timed]:
        """See `race_on_this_rank`."""
        results = []
        for heat in heats:
            timed = [Timed(heat, arm, []) for arm in heat.arms]
            for one in timed:
                self._prove(heat, one.arm)
            for number in range(heat.rounds):
                cut = number * len(timed) // heat.rounds
                for one in [*timed[cut:], *timed[:cut]]:
                    one.seconds.append(self._time(heat, one.arm))
            results += timed
        return results

    def _time(self, heat: Heat, arm: Arm) -> float:
        run = self._ready(heat.kind, arm, torch.zeros(heat.size // 4))
        dist.barrier()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _ready(self, kind: CollectiveKind, arm: Arm, message: Tensor) -> Callable[[], None]:
        """Return a function that runs an arm on a message."""
        groups, lanes = self.tracks[arm.way, arm.mode]
        collectives = full_collective(kind, groups, arm.mode)
        regions = [region_of(bucket, groups, self.member) for bucket in message.chunk(arm.buckets)]

        def run() -> None:
            handles = [lanes.submit(collectives, region, f"bucket {at}") for at, region in enumerate(regions)]
            for handle in handles:
                handle.wait()

        return run

    def _prove(self, heat: Heat, arm: Arm) -> None:
        """Run an arm once on whole numbers and compare with what they come to."""
        groups = self.tracks[arm.way, arm.mode].groups
        mine, is_gather = groups.logical(self.member), heat.kind is CollectiveKind.ALL_GATHER
        places = torch.arange(heat.size // 4, dtype=torch.float32).remainder_(1021).view(arm.buckets, groups.ranks, -1)
        message = torch.full_like(places, -1.0) if is_gather else places * (self.member + 1)
        if is_gather:
            message[:, mine] = places[:, mine]
        self._ready(heat.kind, arm, message.view(-1))()
        expected = places if is_gather else places * sum(range(1, groups.ranks + 1))
        if heat.kind is CollectiveKind.REDUCE_SCATTER:
            message, expected = message[:, mine], expected[:, mine]
        if not torch.equal(message, expected):
            raise ValueError(f"rank {self.member}: {heat.kind} of {heat.size} bytes by {arm} is wrong")
