"""The bytes that a run sends in every step, counted at the collective calls, equal the formula."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron.longseq.sharding.plan.comm_volume import CommVolume, comm_volume
from megatron.longseq.sharding.plan.gather_window import Direction, Point, launches
from megatron.longseq.sharding.plan.memory import Model
from megatron.longseq.sharding.plan.strategy import Strategy
from megatron.longseq.sharding.runtime.collectives import Region
from tests.bucket_volume import bucket_volume
from tests.distributed.sharding_bed import CASES, MORE, STEPS, RankRecord, groups_of, train
from tests.pool import RankPool
from tests.regression.planted import Planted, wrapped

ALL = [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)]


def formula(case: str, seen: RankRecord, microbatches: int) -> CommVolume:
    """Return what the formula says of one step of a rank."""
    groups = groups_of(case)
    is_flat = "flat" in case or 1 in (groups.count, groups.size)  # with links of one kind flat is as fast, and taken
    return bucket_volume(
        Strategy.parse(case[:3]),
        groups,
        seen.buckets,
        seen.widths,
        microbatches,
        is_flat=lambda collectives, size: is_flat,
        gathers=selective_gathers(seen, microbatches) if "selective" in case else None,
    )


def selective_gathers(seen: RankRecord, microbatches: int) -> list[int]:
    """Return the all-gathers of every bucket in a step by the plan; buckets are the units in reverse order."""
    has_backward = [bucket.gathers > 1 for bucket in reversed(seen.buckets)]
    start = [(Point.START, Point.START)] * len(has_backward)
    planned = launches(has_backward, start, 1, tuple(Direction) * microbatches)
    counts = Counter(launch.unit for launch in planned if launch.kind == "gather")
    return [counts[unit] for unit in reversed(range(len(has_backward)))]


def less(after: CommVolume, before: CommVolume) -> CommVolume:
    return after + before * -1


def wrong(case: str, ranks: list[RankRecord]) -> list[str]:
    """Return every difference between what was sent and the formula."""
    found = []
    for seen in ranks:
        assert tuple(seen.microbatches) == STEPS
        # Building the model sends, too, and counts as the first step. What a step leaves to the next forward to send is
        # that one's.
        for step in (1, 2):
            sent, expected = less(seen.sent[step], seen.sent[step - 1]), formula(case, seen, STEPS[step])
            if sent != expected:
                found.append(f"rank {seen.member}, step {step + 1}: sent {sent}, formula {expected}")
    return found


@pytest.mark.parametrize("case", ALL)
def test_bytes_sent_equal_the_formula(
    sharded_run: Callable[[str], list[RankRecord]], case: str, tell: Callable[[str], None]
) -> None:
    ranks = sharded_run(case)
    assert not wrong(case, ranks)
    one, four = (less(ranks[0].sent[step], ranks[0].sent[step - 1]) for step in (1, 2))
    assert one.inside + one.between + one.flat > 0
    tell(f"bytes    {case}: a rank's step of 1 micro-batch {_told(one)}; of 4 {_told(four)}: as the formula")


def _told(sent: CommVolume) -> str:
    return f"{sent.inside} inside, {sent.between} between, {sent.flat} flat in {sent.collectives} calls"


def test_buckets_are_those_of_the_model(sharded_run: Callable[[str], list[RankRecord]]) -> None:
    """Return the units: embedding (gathered before forward only), layers, the last one with the norm, output layer."""
    layer = 32 + 32 * 3 * 32 + 32 * 32 + 32 + 3 * 64 * 32
    (seen, *_) = sharded_run("GGG, flat")
    assert [(bucket.numel, bucket.gathers) for bucket in seen.buckets] == [
        (128 * 32, 2),
        (-(-(layer + 32 + 64) // 128) * 128, 2),  # norms of 32 elements are aligned to 64
        (-(-layer // 128) * 128, 2),
        (128 * 32, 1),
    ]
    assert all(bucket.is_trained for bucket in seen.buckets)


def test_selective_overlap_gathers_what_is_counted(sharded_run: Callable[[str], list[RankRecord]]) -> None:
    """Two units stay at each turn between passes. `comm_volume` takes every unit to have a backward; one has none."""
    (seen, *_) = sharded_run("IIG, selective")
    assert [selective_gathers(seen, count) for count in (1, 4)] == [[1, 1, 2, 1], [4, 4, 5, 4]]
    groups, elements = groups_of("IIG, selective"), 4 * 128
    sent = comm_volume(Strategy.parse("IIG"), groups, Model(elements, elements), buckets=4, prefetch_units=1)
    assert [sent.gathers(count).collectives for count in (1, 4)] == [6, 18]


def test_frozen_layers_below_what_is_trained_are_gathered_once(sharded_run: Callable[[str], list[RankRecord]]) -> None:
    """The first layer and the embedding have no backward; layers above the trained MLP have one."""
    (seen, *_) = sharded_run("ING")
    trained = [bucket for bucket in seen.buckets if bucket.is_trained]
    frozen = [bucket for bucket in seen.buckets if not bucket.is_trained]
    assert [(bucket.numel, bucket.gathers) for bucket in trained] == [(3 * 64 * 32, 2)]
    assert [bucket.gathers for bucket in frozen] == [1, 1, 2, 2], frozen


@contextmanager
def reduced_twice() -> Iterator[Planted]:
    """An additional send of a bucket's gradients in the second step, which no loss shows, is detected."""
    from megatron.longseq.sharding.runtime.bucket_storage import GradStore
    from megatron.longseq.sharding.runtime.state import ShardingState

    planted = Planted()

    def finish(original: Any, self: Any, label: str) -> Any:
        planted.times += 1
        if planted.times == 8:
            copy = self.shard.clone()
            region = Region(None, copy)
            collectives = ShardingState.bucket_collectives(self.sharding, copy.nbytes).finish_grads
            self.sharding.queues.submit(collectives, region, f"gradients of {label} again").wait()
        return original(self, label)

    with wrapped(GradStore, "finish", finish):
        yield planted


def test_a_collective_too_many_is_seen(ranks: RankPool) -> None:
    seen = train(ranks, "IIG", f"{__name__}:reduced_twice")
    found = wrong("IIG", seen)
    assert len(found) == 4 and all("step 2" in line for line in found), found
