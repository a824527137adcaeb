"""Fitting measured times recovers the links of the time model, also with noise; flat is the default choice."""

import random
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.sharding.plan.collectives import Collective, CollectiveKind, CollectivesMode, Scope, nontrivial
from megatron.longseq.sharding.plan.flat_or_hierarchical import choose_mode
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import LinkSpeed, LinkSpeeds, ring_seconds
from megatron.longseq.sharding.tools.probe_links import Measurement, fit_link, fit_links, log_error

SHARDS = (2**12, 2**16, 2**20)
kinds = st.sampled_from(list(CollectiveKind))
speeds = st.floats(1e6, 1e12)


def clocked(kind: CollectiveKind, groups: RankGroups, links: LinkSpeeds, noise: float = 0.0) -> list[Measurement]:
    """Return the times that links would take, each off by a random factor."""
    off = random.Random(0)
    return [
        Measurement(collective, shard, links.seconds(collective, groups, shard) * (1 + noise) ** off.uniform(-1, 1))
        for collective in nontrivial(tuple(Collective(kind, scope) for scope in Scope), groups)
        for shard in SHARDS
    ]


@given(kinds, st.integers(2, 8), st.integers(2, 8), speeds, st.floats(2, 20), st.floats(0, 1e-3), st.data())
def test_links_are_found_again(
    kind: CollectiveKind, size: int, count: int, speed: float, ratio: float, latency: float, data: st.DataObject
) -> None:
    groups = RankGroups(size * count, size)
    links = LinkSpeeds(
        LinkSpeed(speed, latency / ratio),
        LinkSpeed(speed / ratio / size / count, latency),
        data.draw(st.integers(1, size)),
    )
    timed = clocked(kind, groups, links)
    found = fit_links(groups, timed)
    assert found.channels == links.channels
    for one in timed:
        assert found.seconds(one.collective, groups, one.shard) == pytest.approx(one.seconds, rel=1e-6)
    assert log_error(groups, found, timed) < 1e-10


@pytest.mark.parametrize("channels", [1, 4])
def test_a_flat_ring_that_shares_a_link_is_told_from_one_that_does_not(channels: int) -> None:
    groups, links = RankGroups(8, 4), LinkSpeeds(LinkSpeed(1e10, 1e-5), LinkSpeed(1e8, 5e-5), channels)
    found = fit_links(groups, clocked(CollectiveKind.ALL_GATHER, groups, links, noise=0.1))
    assert found.channels == channels
    for ours, theirs in ((found.inside, links.inside), (found.between, links.between)):
        assert ours.bandwidth == pytest.approx(theirs.bandwidth, rel=0.25)
        assert ours.latency == pytest.approx(theirs.latency, rel=0.25)


def test_links_that_nothing_goes_over_cost_nothing() -> None:
    flat = RankGroups(4, 4)
    links = fit_links(flat, clocked(CollectiveKind.ALL_GATHER, flat, LinkSpeeds(LinkSpeed(1e9, 1e-5), LinkSpeed(1.0))))
    assert links.between == LinkSpeed(inf) and links.inside.bandwidth == pytest.approx(1e9)
    assert fit_links(RankGroups(1, 1), []) == LinkSpeeds(LinkSpeed(inf), LinkSpeed(inf))


@given(st.lists(st.tuples(st.sampled_from([1, 10, 100, 1000]), st.floats(0.01, 100)), min_size=1, max_size=5))
def test_no_link_is_nearer_to_noisy_times(points: list[tuple[int, float]]) -> None:
    """This includes times in which larger messages are faster, or so much slower that the latency would be negative."""
    groups, collective = RankGroups(2, 2), Collective(CollectiveKind.ALL_GATHER, Scope.INSIDE)
    link = fit_link(groups, [Measurement(collective, size, time) for size, time in points])
    assert link is not None and link.latency >= 0 and link.bandwidth > 0

    def off(latency: float, per_byte: float) -> float:
        return sum((1 - (max(latency, 0) + size * max(per_byte, 0)) / time) ** 2 for size, time in points)

    ours = off(link.latency, 1 / link.bandwidth)
    for more in (-1e-1, -1e-3, 0, 1e-3, 1e-1):
        for larger in (-1e-2, -1e-4, 0, 1e-4, 1e-2):
            assert ours <= off(link.latency + more, 1 / link.bandwidth + larger) + 1e-9


@pytest.mark.parametrize(
    ("times", "link"),
    [
        ((1.0, 1.0), LinkSpeed(inf, 1.0)),  # size does not matter
        ((2.0, 1.0), LinkSpeed(inf, 1.2)),  # larger is faster: no bandwidth explains it
        ((1.0, 10.0), LinkSpeed(1.0)),
        ((1.0, 200.0), LinkSpeed(401 / 420)),  # (1 + 1/400) / (1 + 10/200): the latency would be negative
        ((3.0,), LinkSpeed(1 / 3)),  # one size says nothing of latency
    ],
)
def test_figures_by_hand(times: tuple[float, ...], link: LinkSpeed) -> None:
    groups, collective = RankGroups(2, 2), Collective(CollectiveKind.ALL_GATHER, Scope.INSIDE)
    found = fit_link(groups, [Measurement(collective, 10**index, time) for index, time in enumerate(times)])
    assert found is not None
    assert found.latency == pytest.approx(link.latency, abs=1e-12)
    assert 1 / found.bandwidth == pytest.approx(1 / link.bandwidth, abs=1e-12)


def test_a_time_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="times must be positive"):
        fit_link(RankGroups(2, 2), [Measurement(Collective(CollectiveKind.ALL_GATHER, Scope.INSIDE), 8, 0.0)])


FAR = LinkSpeeds(LinkSpeed(1e10, 1e-6), LinkSpeed(5e8, 1e-6), channels=1)


@given(
    kinds, st.integers(1, 4), st.integers(1, 4), st.lists(st.floats(1, 1e8), min_size=1, max_size=6), st.floats(0, 0.5)
)
def test_never_slower_than_flat_and_flat_within_the_margin(
    kind: CollectiveKind, size: int, count: int, shards: list[float], margin: float
) -> None:
    groups = RankGroups(size * count, size)
    mode = choose_mode(kind, groups, FAR, shards, margin=margin)
    times = {mode: ring_seconds(kind, mode, groups, FAR, shards) for mode in CollectivesMode}
    flat = times[CollectivesMode.FLAT]
    if mode is CollectivesMode.FLAT:
        assert min(times.values()) * (1 + margin) >= flat
    else:
        assert times[mode] == min(times.values()) and flat / times[mode] > 1 + margin


def test_one_bucket_overlaps_with_nothing() -> None:
    assert choose_mode(CollectiveKind.ALL_GATHER, RankGroups(16, 4), FAR, [2**24]) is CollectivesMode.HIERARCHICAL
