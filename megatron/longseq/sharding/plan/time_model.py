"""The clock of collectives over all ranks: seconds flat, hierarchical and overlapped, and which one to take.

All members do the same at the same time, so one of them is timed. A message takes a link's latency and its bytes over
the link's bandwidth; a flat ring goes at the pace of its slowest hop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import NamedTuple

from megatron.longseq.sharding.plan.collectives import Kind, Phase, Phases, Scope
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.ring import Mode, Run, schedule, whole


@dataclass(frozen=True, slots=True)
class Link:
    """What a rank sends over.

    Attributes:
        bandwidth: bytes per second.
        latency: seconds per message.

    Raises:
        ValueError: not positive, or a negative latency.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and isfinite(self.latency) and self.latency >= 0):
            raise ValueError(f"a link of {self.bandwidth} bytes/s and {self.latency} s: give a speed and a latency")

    def seconds(self, size: float) -> float:
        """Return the seconds of a message of some bytes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True, slots=True)
class Links:
    """Links of a rank.

    Attributes:
        inside: to ranks of its group.
        between: to other groups, its share where the ranks of a node share one.
        channels: how many ranks' links between groups a flat ring fills. The group's size where one link is shared by
            all, or where a library runs a ring over each; 1 where every rank has its own and one ring leaves by one.

    Raises:
        ValueError: no channel.
    """

    inside: Link
    between: Link
    channels: int = 1

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"a flat ring over {self.channels} links between groups: give at least 1")

    def seconds(self, phase: Phase, groups: Groups, shard: float) -> float:
        """Return the seconds of a phase on a bucket.

        Args:
            phase: the collective.
            groups: the ranks.
            shard: bytes of one of the bucket's n shards.
        """
        size = phase.piece(groups) * shard
        hops = []
        if phase.scope is Scope.INSIDE or (phase.scope is Scope.FLAT and groups.size > 1):
            hops.append(self.inside.seconds(size))
        if phase.scope is Scope.BETWEEN or (phase.scope is Scope.FLAT and groups.count > 1):
            channels = min(self.channels, groups.size) if phase.scope is Scope.FLAT else 1
            hops.append(self.between.seconds(size / channels))
        return phase.steps(groups) * max(hops, default=0.0)


class Span(NamedTuple):
    """When a phase of a bucket runs, in seconds."""

    run: Run
    begin: float
    end: float


def simulate(
    phases: Phases,
    groups: Groups,
    links: Links,
    shards: Sequence[float],
    *,
    is_overlapped: bool,
    ready: Sequence[float] | None = None,
) -> tuple[Span, ...]:
    """Return when every phase of every bucket runs, in the order of `ring.schedule`, none waiting for a slot's others.

    Args:
        phases: of every bucket.
        groups: the ranks.
        links: their speeds.
        shards: bytes of one of n shards, of every bucket.
        is_overlapped: different links work at the same time; else everything waits for what is before it.
        ready: seconds at which each bucket is there; None: all at 0.

    Raises:
        ValueError: not one time per bucket.
    """
    ready = [0.0] * len(shards) if ready is None else ready
    if len(ready) != len(shards):
        raise ValueError(f"{len(ready)} times at which buckets are there, for {len(shards)} buckets")
    free = dict.fromkeys(Scope, 0.0)
    reached = list(ready)
    spans = []
    for run in schedule(phases, len(shards), is_overlapped=is_overlapped):
        scope = run.phase.scope if is_overlapped else Scope.FLAT
        begin = max(free[scope], reached[run.bucket])
        end = begin + links.seconds(run.phase, groups, shards[run.bucket])
        free[scope] = reached[run.bucket] = end
        spans.append(Span(run, begin, end))
    return tuple(spans)


def seconds(
    kind: Kind, mode: Mode, groups: Groups, links: Links, shards: Sequence[float], ready: Sequence[float] | None = None
) -> float:
    """Return when the last bucket of a collective over all ranks is done; arguments as of `simulate`."""
    spans = simulate(
        whole(kind, groups, mode), groups, links, shards, is_overlapped=mode is Mode.OVERLAPPED, ready=ready
    )
    return max((span.end for span in spans), default=0.0)


class Choice(NamedTuple):
    """How to run a collective.

    Attributes:
        mode: how.
        buckets: of a message, cut evenly.
        seconds: predicted of it.
        flat: predicted of one flat ring.
    """

    mode: Mode
    buckets: int
    seconds: float
    flat: float

    @property
    def speedup(self) -> float:
        """How many times faster than flat; 1 where nothing is sent."""
        return self.flat / self.seconds if self.seconds else 1.0


def choose(
    kind: Kind,
    groups: Groups,
    links: Links,
    size: int,
    *,
    buckets: Sequence[int] = (1, 2, 4, 8, 16, 32),
    margin: float = 0.05,
) -> Choice:
    """Return how to run a collective of some bytes: flat, unless another way is predicted to be faster by a margin.

    Args:
        kind: what it does.
        groups: the ranks.
        links: their speeds.
        size: bytes of the whole message.
        buckets: numbers of buckets that it may be cut into.
        margin: by how much; what a cost model may err.

    Raises:
        ValueError: nothing to choose from.
    """
    if not buckets or min(buckets) < 1:
        raise ValueError(f"a message in {list(buckets)} buckets: give numbers from 1")
    shard = size / groups.ranks
    flat = seconds(kind, Mode.FLAT, groups, links, [shard])
    best = Choice(Mode.FLAT, 1, inf, flat)
    for mode in (Mode.HIERARCHICAL, Mode.OVERLAPPED):
        for count in buckets if mode is Mode.OVERLAPPED else (1,):
            predicted = seconds(kind, mode, groups, links, [shard / count] * count)
            if predicted < best.seconds:
                best = Choice(mode, count, predicted, flat)
    return best if best.seconds * (1 + margin) < flat else Choice(Mode.FLAT, 1, flat, flat)
