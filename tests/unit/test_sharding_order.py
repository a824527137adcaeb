"""The order of collectives on links equals the plan if all buckets are ready, and is never much slower."""

from itertools import zip_longest

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron.longseq.sharding.plan.collectives import (
    GATHER_BETWEEN,
    GATHER_INSIDE,
    REDUCE_BETWEEN,
    SCATTER_BETWEEN,
    SCATTER_INSIDE,
    Collective,
    CollectiveKind,
    Collectives,
    CollectivesMode,
    Scope,
    full_collective,
)
from megatron.longseq.sharding.plan.overlap_order import OverlapOrder, QueuedCollective, schedule
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import LinkSpeed, LinkSpeeds, time_collectives

GROUPS = RankGroups(6, 3)
ALL_REDUCE = (SCATTER_INSIDE, REDUCE_BETWEEN, GATHER_INSIDE)
FLAT = (Collective(CollectiveKind.ALL_REDUCE, Scope.FLAT),)
kinds = st.sampled_from(list(CollectiveKind))


def batch(
    collectives: Collectives, buckets: int, *, is_overlapped: bool = True, lag: int = 1
) -> list[QueuedCollective]:
    """Return the order of a batch that is submitted and then waited for."""
    order = OverlapOrder(is_overlapped=is_overlapped, lag=lag)
    return [turn for _ in range(buckets) for turn in order.submit(collectives)] + order.flush(buckets - 1)


def on(link: Scope, turns: list[QueuedCollective]) -> list[tuple[int, int]]:
    return [(turn.job, turn.turn) for turn in turns if turn.link is link]


@given(kinds, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_a_batch_has_the_order_of_the_plan(kind: CollectiveKind, buckets: int, more: int, is_overlapped: bool) -> None:
    collectives = full_collective(kind, GROUPS, CollectivesMode.OVERLAPPED)
    turns = batch(collectives, buckets, is_overlapped=is_overlapped, lag=buckets + more)
    runs = schedule(collectives, buckets, is_overlapped=is_overlapped)
    for scope in (Scope.INSIDE, Scope.BETWEEN):
        if is_overlapped:
            assert on(scope, turns) == [(run.bucket, run.turn) for run in runs if run.collective.scope is scope]
        elif scope is Scope.BETWEEN:
            assert on(scope, turns) == [(run.bucket, run.turn) for run in runs]
    assert all(turn.collective == collectives[turn.turn] for turn in turns)


@given(
    st.sampled_from([CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER]), st.integers(1, 9), st.integers(1, 4)
)
def test_a_job_that_comes_back_to_no_link_is_never_held_back(kind: CollectiveKind, buckets: int, lag: int) -> None:
    collectives, order = (
        full_collective(kind, GROUPS, CollectivesMode.OVERLAPPED),
        OverlapOrder(is_overlapped=True, lag=lag),
    )
    assert all(len(order.submit(collectives)) == len(collectives) for _ in range(buckets)) and not order.flush(buckets)


def test_the_next_job_starts_before_one_comes_back() -> None:
    order = OverlapOrder(is_overlapped=True)
    first, second, third = (on(Scope.INSIDE, order.submit(ALL_REDUCE)) for _ in range(3))
    assert (first, second, third) == ([(0, 0)], [(1, 0), (0, 2)], [(2, 0), (1, 2)])
    assert on(Scope.INSIDE, order.flush(1)) == [] and on(Scope.INSIDE, order.flush(2)) == [(2, 2)]
    assert order.flush(9) == []


def test_waiting_for_an_early_job_holds_the_later_ones_back() -> None:
    order = OverlapOrder(is_overlapped=True, lag=3)
    for _ in range(3):
        order.submit(ALL_REDUCE)
    assert on(Scope.INSIDE, order.flush(0)) == [(0, 2)]
    assert on(Scope.INSIDE, order.submit(ALL_REDUCE)) == [(3, 0)]
    assert on(Scope.INSIDE, order.submit(ALL_REDUCE)) == [(4, 0), (1, 2)]


def test_a_flat_collective_waits_its_turn_between_groups() -> None:
    order = OverlapOrder(is_overlapped=True)
    turns = [*order.submit((SCATTER_INSIDE, SCATTER_BETWEEN)), *order.submit(FLAT), *order.submit((GATHER_BETWEEN,))]
    assert on(Scope.BETWEEN, turns) == [(0, 1), (1, 0), (2, 0)] and on(Scope.INSIDE, turns) == [(0, 0)]


def test_one_link_holds_nothing_back() -> None:
    order = OverlapOrder(is_overlapped=False)
    assert [turn.link for turn in order.submit(ALL_REDUCE)] == [Scope.BETWEEN] * 3
    assert [turn.collective for turn in order.submit(FLAT)] == list(FLAT)


def test_no_lag_is_refused() -> None:
    with pytest.raises(ValueError, match="the lag is 0 submissions, but must be at least 1"):
        OverlapOrder(is_overlapped=True, lag=0)


def clock(turns: list[QueuedCollective], links: LinkSpeeds) -> float:
    """Return when the last of them is done, each starting when its link and its job's phase before it are."""
    free: dict[Scope, float] = dict.fromkeys(Scope, 0.0)
    reached: dict[int, float] = {}
    for turn in turns:
        begin = max(free[turn.link], reached.get(turn.job, 0.0))
        free[turn.link] = reached[turn.job] = begin + links.seconds(turn.collective, GROUPS, 1.0)
    return max(reached.values())


@example(CollectiveKind.ALL_REDUCE, 20, 3.8, 1)  # 1.8 phases
@given(kinds, st.integers(1, 12), st.floats(0.05, 20), st.integers(1, 3))
def test_coming_back_soon_costs_two_phases_inside_at_most(
    kind: CollectiveKind, buckets: int, slower: float, lag: int
) -> None:
    """Compare with the order that starts all buckets first. An all-reduce has two phases inside; one bucket is late."""
    links = LinkSpeeds(LinkSpeed(6.0), LinkSpeed(6.0 / slower))
    collectives = full_collective(kind, GROUPS, CollectivesMode.OVERLAPPED)
    best = max(span.end for span in time_collectives(collectives, GROUPS, links, [1.0] * buckets, is_overlapped=True))
    inside = links.seconds(GATHER_INSIDE, GROUPS, 1.0)
    taken = clock(batch(collectives, buckets, lag=lag), links)
    assert taken <= best + 2 * inside * (1 + 1e-9)
    if buckets <= lag or kind is not CollectiveKind.ALL_REDUCE:
        assert taken == pytest.approx(best)


@given(st.lists(st.sampled_from([ALL_REDUCE, ALL_REDUCE[:2], ALL_REDUCE[1:], FLAT]), max_size=9), st.integers(1, 4))
def test_every_phase_goes_once_and_after_the_one_before_it(jobs: list[Collectives], lag: int) -> None:
    order, turns = OverlapOrder(is_overlapped=True, lag=lag), []
    for job, collectives in enumerate(jobs):
        turns += order.submit(collectives)
        turns += order.flush(job) if job % 3 == 2 else []
    turns += order.flush(len(jobs))
    for job, collectives in enumerate(jobs):
        went = [(turn.turn, turn.collective) for turn in turns if turn.job == job]
        assert all(a == b for a, b in zip_longest(went, enumerate(collectives)))
