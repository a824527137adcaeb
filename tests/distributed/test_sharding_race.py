"""The benchmark of collectives computes correct results, and its bytes are counted at the calls."""

from collections import Counter

import pytest

from megatron.longseq.sharding.plan.collectives import CollectiveKind, CollectivesMode, full_collective
from megatron.longseq.sharding.plan.comm_volume import volume
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from tests.benchmarks.calls import SentMessages, watching
from tests.benchmarks.sharding_race import GLOO, RING, Arm, Heat, race_on_this_rank
from tests.pool import RankFailure

pytestmark = pytest.mark.slow  # a benchmark's own tests
GROUPS = RankGroups(4, 2)
SIZE = 2**18  # bytes; its smallest pieces are no small talk
FLAT = (Arm(GLOO, CollectivesMode.FLAT, 1),)
GROUPED = (Arm(GLOO, CollectivesMode.HIERARCHICAL, 1), Arm(GLOO, CollectivesMode.OVERLAPPED, 4))
RINGS = tuple(Arm(RING, mode, buckets) for mode, buckets in zip(CollectivesMode, (1, 2, 4), strict=True))


def watched(heats: list[Heat]) -> SentMessages:
    """Run the benchmark and count its calls; runs on a rank."""
    with watching() as seen:
        race_on_this_rank(GROUPS.size, heats)
    return seen


def out_of_order(heats: list[Heat]) -> None:
    """Run the benchmark with rings whose messages arrive one shard off; runs on a rank."""
    from megatron.longseq.sharding.runtime import gloo_ring as messages

    steps = messages.ring_messages

    def twisted(*args):
        return tuple(
            step._replace(receive=step.receive._replace(begin=step.send.begin, end=step.send.end))
            for step in steps(*args)
        )

    messages.ring_messages = twisted
    race_on_this_rank(GROUPS.size, heats)


@pytest.mark.parametrize("kind", CollectiveKind)
def test_every_arm_is_right_and_timed_in_every_round(ranks, kind):
    """Every rank checks the result of an arm before it times it."""
    results = ranks.run(4, race_on_this_rank, GROUPS.size, [Heat(kind, SIZE, FLAT + GROUPED + RINGS, 2)])
    for timed in results:
        assert [one.arm for one in timed] == [*FLAT, *GROUPED, *RINGS]
        assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in timed)


@pytest.mark.parametrize("kind", CollectiveKind)
def test_a_ring_that_is_wrong_is_noticed(ranks, kind):
    with pytest.raises(RankFailure, match="is wrong"):
        ranks.run(4, out_of_order, [Heat(kind, SIZE, RINGS[:1], 1)])


@pytest.mark.parametrize("kind", CollectiveKind)
def test_calls_in_lanes_are_seen_and_are_the_formula_s(ranks, kind):
    results = ranks.run(4, watched, [Heat(kind, SIZE, FLAT + GROUPED + RINGS, 2)])
    shard, times = SIZE // GROUPS.ranks, 3  # once to be looked at, twice to be timed
    for rank, seen in enumerate(results):
        inside, between = (rank // 2 * 2, rank // 2 * 2 + 1), (rank % 2, rank % 2 + 2)
        sent, calls = Counter(), 0
        for arm in FLAT + GROUPED + RINGS:
            collectives = full_collective(kind, GROUPS, arm.mode)
            one = volume(collectives, GROUPS, shard)
            order = (0, 1, 2, 3) if arm.way == GLOO else (0, 2, 1, 3)
            for members, size in ((inside, one.inside), (between, one.between), (order, one.flat)):
                sent[members] += times * size
            messages = sum(collective.steps(GROUPS) for collective in collectives)
            calls += times * arm.buckets * (messages if arm.way == RING else one.collectives)
        assert seen.bytes == sent
        assert sum(seen.collectives.values()) == calls
