"""From measured collectives to the speed of links, and from that to how collectives of given buckets should run.

What is measured is taken as rings, as `ringtime` does: seconds per message are a latency and bytes over a bandwidth.
"""

from collections.abc import Sequence
from math import inf, log
from typing import NamedTuple

from megatron.longseq.sharding.plan.collectives import Kind, Phase, Scope
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.ring import Mode
from megatron.longseq.sharding.plan.time_model import Choice, Link, Links, seconds


class Timed(NamedTuple):
    """A collective that was measured.

    Attributes:
        phase: which.
        shard: bytes of one of the bucket's n shards.
        seconds: it took.
    """

    phase: Phase
    shard: int
    seconds: float


def fit_link(groups: Groups, timed: Sequence[Timed]) -> Link | None:
    """Return the link on which collectives would take these times, nearest by relative errors; None: there are none.

    Raises:
        ValueError: a time that is not positive.
    """
    points = [
        (phase.piece(groups) * shard, time / phase.steps(groups)) for phase, shard, time in timed if phase.steps(groups)
    ]
    if not points:
        return None
    if min(time for _, time in points) <= 0:
        raise ValueError(f"collectives that took {[one.seconds for one in timed]} s: times must be positive")
    # The squares of 1 - (latency + size / bandwidth) / time, which is linear in u = 1 / time and v = size / time.
    u, v = [1 / time for _, time in points], [size / time for size, time in points]
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
    return Link(1 / per_byte if per_byte else inf, latency)


def fit_links(groups: Groups, timed: Sequence[Timed]) -> Links:
    """Return the links on which collectives would take these times.

    How many links between groups a flat ring fills is what explains the flat ones' times best, the fewest of equals. A
    link that nothing was sent over is as fast as can be.
    """
    scoped = {scope: [one for one in timed if one.phase.scope is scope] for scope in Scope}
    inside, between = (fit_link(groups, scoped[scope]) or Link(inf) for scope in (Scope.INSIDE, Scope.BETWEEN))
    every = [Links(inside, between, channels) for channels in range(1, groups.size + 1)]
    return min(every, key=lambda links: apart(groups, links, scoped[Scope.FLAT]))


def apart(groups: Groups, links: Links, timed: Sequence[Timed]) -> float:
    """Return how far predictions are from times: the mean square of the logarithms of their ratios."""
    predicted = [links.seconds(one.phase, groups, one.shard) for one in timed]
    ratios = [said / one.seconds for said, one in zip(predicted, timed, strict=True) if said]
    return sum(log(ratio) ** 2 for ratio in ratios) / max(len(ratios), 1)


def pick(
    kind: Kind,
    groups: Groups,
    links: Links,
    shards: Sequence[float],
    *,
    ready: Sequence[float] | None = None,
    margin: float = 0.05,
) -> Choice:
    """Return how to run a collective over all ranks of buckets as they are: flat, unless another way wins by a margin.

    Args:
        kind: what it does.
        groups: the ranks.
        links: their speeds.
        shards: bytes of one of n shards, of every bucket.
        ready: seconds at which each bucket is there; None: all at 0.
        margin: by how much; what a cost model may err.
    """
    times = {mode: seconds(kind, mode, groups, links, shards, ready) for mode in Mode}
    best = min(Mode, key=lambda mode: times[mode])  # of equals the first: the simpler one
    mode = best if times[best] * (1 + margin) < times[Mode.FLAT] else Mode.FLAT
    return Choice(mode, len(shards), times[mode], times[Mode.FLAT])
