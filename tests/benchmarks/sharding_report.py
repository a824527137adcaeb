"""What the race of collectives measured: medians, ratios round by round, the clock's predictions beside them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.longseq.sharding.plan.collectives import CollectiveKind, CollectivesMode
from megatron.longseq.sharding.plan.flat_or_hierarchical import choose_mode
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import LinkSpeed, LinkSpeeds, ring_seconds
from tests.benchmarks.sharding_race import GLOO, RING, Arm, Heat, Timed
from tests.benchmarks.twonodes_check import Pace

BUCKETS = (1, 2, 4, 8, 16)
WAYS = (GLOO, RING)


def links_of(pace: Pace, ranks: int) -> LinkSpeeds:
    """Return the links of a rank, for the clock: its shares, as a node's ranks send at once."""
    share = pace.rates.of_rank(ranks)
    inside, between = LinkSpeed(share.inside, pace.latency.inside), LinkSpeed(share.between, pace.latency.between)
    return LinkSpeeds(inside, between, channels=ranks)


def heats(
    groups: RankGroups, links: LinkSpeeds, sizes: Sequence[int], rounds: int, buckets: Sequence[int] = BUCKETS
) -> list[Heat]:
    """Return what to race: every kind at every size, overlapped in the buckets that the clock likes best.

    Args:
        groups: the ranks.
        links: of a rank; predictions take them.
        sizes: bytes of messages.
        rounds: at the largest size; at smaller ones twice as many.
        buckets: numbers of them to choose from.
    """
    program = []
    for kind in CollectiveKind:
        for size in sizes:
            best = min(
                buckets, key=lambda count: predicted(kind, CollectivesMode.OVERLAPPED, groups, links, size, count)
            )
            modes = ((CollectivesMode.FLAT, 1), (CollectivesMode.HIERARCHICAL, 1), (CollectivesMode.OVERLAPPED, best))
            arms = [Arm(way, mode, count) for way in WAYS for mode, count in modes]
            program.append(Heat(kind, size, tuple(arms), rounds if size == max(sizes) else 2 * rounds))
    return program


def predicted(
    kind: CollectiveKind, mode: CollectivesMode, groups: RankGroups, links: LinkSpeeds, size: int, buckets: int
) -> float:
    """Return the clock's seconds of a message that is cut evenly."""
    return ring_seconds(kind, mode, groups, links, cut(size, groups, buckets))


def cut(size: int, groups: RankGroups, buckets: int) -> list[float]:
    """Return bytes of a shard of every bucket of a message."""
    return [size / groups.ranks / buckets] * buckets


@dataclass(frozen=True)
class Measured:
    """One heat.

    Attributes:
        heat: which.
        seconds: of every arm, by round: of the slowest rank.
        predicted: seconds of every mode.
        choice: what the runtime would run of the message in the overlapped arm's buckets.
    """

    heat: Heat
    seconds: Mapping[Arm, Sequence[float]]
    predicted: Mapping[CollectivesMode, float]
    choice: CollectivesMode

    def of(self, way: str, mode: CollectivesMode) -> Sequence[float]:
        """Return the seconds of one arm."""
        return next(found for arm, found in self.seconds.items() if (arm.way, arm.mode) == (way, mode))

    def ratios(self, over: tuple[str, CollectivesMode], under: tuple[str, CollectivesMode]) -> list[float]:
        """Return round by round how many times faster one arm is than another."""
        return [slow / fast for fast, slow in zip(self.of(*over), self.of(*under), strict=True)]

    @property
    def best_flat(self) -> tuple[str, CollectivesMode]:
        """Return the faster of the flat arms whose ring neighbours are on neighbouring ranks."""
        return min(((way, CollectivesMode.FLAT) for way in WAYS), key=lambda arm: statistics.median(self.of(*arm)))

    @property
    def chosen(self) -> tuple[str, CollectivesMode]:
        """Return the arm that the runtime would choose."""
        return RING, self.choice


def measured(
    ranks: Sequence[Sequence[Timed]], groups: RankGroups, links: LinkSpeeds, probed: LinkSpeeds
) -> list[Measured]:
    """Return the heats of a race.

    Args:
        ranks: what every one timed.
        groups: the ranks.
        links: of a rank; predictions take them.
        probed: the same as `probe` measures them; a run that is given those chooses by them.
    """
    found: dict[Heat, dict[Arm, list[float]]] = {}
    for same in zip(*ranks, strict=True):
        rounds = zip(*(one.seconds for one in same), strict=True)
        found.setdefault(same[0].heat, {})[same[0].arm] = [max(each) for each in rounds]
    return [
        Measured(
            heat,
            seconds,
            {arm.mode: predicted(heat.kind, arm.mode, groups, links, heat.size, arm.buckets) for arm in heat.arms},
            choose_mode(heat.kind, groups, probed, cut(heat.size, groups, max(arm.buckets for arm in heat.arms))),
        )
        for heat, seconds in found.items()
    ]


def text(results: Sequence[Measured]) -> str:
    """Return the tables."""
    lines = [
        "milliseconds, median over rounds (predicted by the clock). ring: message by message, as the runtime does on",
        "gloo; gloo: its own collectives",
    ]
    for one in results:
        kind, size, chosen = one.heat.kind, one.heat.size, one.choice
        lines.append(f"{kind} {size / 2**20:g} MiB, {one.heat.rounds} rounds; the runtime picks {chosen}")
        for arm, found in one.seconds.items():
            middle, least, most = (1e3 * pick(found) for pick in (statistics.median, min, max))
            lines.append(
                f"  {arm.way:8} {arm.mode:13} {arm.buckets:3} buckets {middle:9.1f} "
                f"({1e3 * one.predicted[arm.mode]:.1f}; {least:.1f} to {most:.1f})"
            )
    lines.append("throughput over: median of rounds (least to most; predicted)")
    for one in results:
        for way in WAYS:
            over = (way, CollectivesMode.OVERLAPPED)
            parts = [f"{one.heat.kind:15} {one.heat.size / 2**20:4g} MiB {way:5}"]
            for name, mode in (("flat", CollectivesMode.FLAT), ("serial", CollectivesMode.HIERARCHICAL)):
                clock = one.predicted[mode] / one.predicted[CollectivesMode.OVERLAPPED]
                parts.append(f"overlapped/{name} {_spread(one.ratios(over, (way, mode)))} ({clock:.2f})")
            lines.append("  " + "  ".join(parts))
    return "\n".join(lines)


def summary(results: Sequence[Measured]) -> dict[str, object]:
    """Return the figures of the JSON line: geometric means over the kinds, at the largest size."""
    largest = max(one.heat.size for one in results)
    large = [one for one in results if one.heat.size == largest]
    ours = (RING, CollectivesMode.OVERLAPPED)

    def clock(under: CollectivesMode) -> float:
        return statistics.geometric_mean(
            one.predicted[under] / one.predicted[CollectivesMode.OVERLAPPED] for one in large
        )

    def ratio(over: tuple[str, CollectivesMode], under: tuple[str, CollectivesMode]) -> float:
        return statistics.geometric_mean(statistics.median(one.ratios(over, under)) for one in large)

    return {
        "overlapped_over_flat": ratio(ours, (RING, CollectivesMode.FLAT)),
        "overlapped_over_serial": ratio(ours, (RING, CollectivesMode.HIERARCHICAL)),
        "overlapped_over_best_flat": statistics.geometric_mean(
            statistics.median(one.ratios(ours, one.best_flat)) for one in large
        ),
        "overlapped_over_flat_predicted": clock(CollectivesMode.FLAT),
        "overlapped_over_serial_predicted": clock(CollectivesMode.HIERARCHICAL),
        "gloo_overlapped_over_flat": ratio((GLOO, CollectivesMode.OVERLAPPED), (GLOO, CollectivesMode.FLAT)),
        "gloo_overlapped_over_serial": ratio((GLOO, CollectivesMode.OVERLAPPED), (GLOO, CollectivesMode.HIERARCHICAL)),
        "chosen_over_flat_least": min(statistics.median(one.ratios(one.chosen, one.best_flat)) for one in results),
        "by_kind": {
            one.heat.kind: [
                statistics.median(one.ratios(ours, (RING, mode)))
                for mode in (CollectivesMode.FLAT, CollectivesMode.HIERARCHICAL)
            ]
            for one in large
        },
        "large_bytes": largest,
    }


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}..{max(values):.2f}]"
