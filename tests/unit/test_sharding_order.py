"""In which order phases go on links: as the plan has it where all buckets are there, and never much slower."""

from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.sharding.plan.collectives import (
    GATHER_BETWEEN,
    GATHER_INSIDE,
    REDUCE_BETWEEN,
    SCATTER_BETWEEN,
    SCATTER_INSIDE,
    Kind,
    Phase,
    Phases,
    Scope,
)
from megatron.longseq.sharding.plan.overlap_order import Order, Track, Turn
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.ring import Mode, schedule, whole
from megatron.longseq.sharding.plan.time_model import Link, Links, simulate

GROUPS = Groups(6, 3)
ALL_REDUCE = (SCATTER_INSIDE, REDUCE_BETWEEN, GATHER_INSIDE)
FLAT = (Phase(Kind.ALL_REDUCE, Scope.FLAT),)
kinds = st.sampled_from(list(Kind))


def batch(phases: Phases, buckets: int, *, is_overlapped: bool = True, lag: int = 1) -> list[Turn]:
    """Return the order of a batch that is submitted and then waited for."""
    order = Order(is_overlapped=is_overlapped, lag=lag)
    return [turn for _ in range(buckets) for turn in order.submit(phases)] + order.flush(buckets - 1)


def on(track: Track, turns: list[Turn]) -> list[tuple[int, int]]:
    return [(turn.job, turn.turn) for turn in turns if turn.track is track]


@given(kinds, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_a_batch_has_the_order_of_the_plan(kind: Kind, buckets: int, more: int, is_overlapped: bool) -> None:
    phases = whole(kind, GROUPS, Mode.OVERLAPPED)
    turns = batch(phases, buckets, is_overlapped=is_overlapped, lag=buckets + more)
    runs = schedule(phases, buckets, is_overlapped=is_overlapped)
    for scope, track in ((Scope.INSIDE, Track.INSIDE), (Scope.BETWEEN, Track.BETWEEN)):
        if is_overlapped:
            assert on(track, turns) == [(run.bucket, run.turn) for run in runs if run.phase.scope is scope]
        elif track is Track.BETWEEN:
            assert on(track, turns) == [(run.bucket, run.turn) for run in runs]
    assert all(turn.phase == phases[turn.turn] for turn in turns)


@given(st.sampled_from([Kind.ALL_GATHER, Kind.REDUCE_SCATTER]), st.integers(1, 9), st.integers(1, 4))
def test_a_job_that_comes_back_to_no_link_is_never_held_back(kind: Kind, buckets: int, lag: int) -> None:
    phases, order = whole(kind, GROUPS, Mode.OVERLAPPED), Order(is_overlapped=True, lag=lag)
    assert all(len(order.submit(phases)) == len(phases) for _ in range(buckets)) and not order.flush(buckets)


def test_the_next_job_starts_before_one_comes_back() -> None:
    order = Order(is_overlapped=True)
    first, second, third = (on(Track.INSIDE, order.submit(ALL_REDUCE)) for _ in range(3))
    assert (first, second, third) == ([(0, 0)], [(1, 0), (0, 2)], [(2, 0), (1, 2)])
    assert on(Track.INSIDE, order.flush(1)) == [] and on(Track.INSIDE, order.flush(2)) == [(2, 2)]
    assert order.flush(9) == []


def test_waiting_for_an_early_job_holds_the_later_ones_back() -> None:
    order = Order(is_overlapped=True, lag=3)
    for _ in range(3):
        order.submit(ALL_REDUCE)
    assert on(Track.INSIDE, order.flush(0)) == [(0, 2)]
    assert on(Track.INSIDE, order.submit(ALL_REDUCE)) == [(3, 0)]
    assert on(Track.INSIDE, order.submit(ALL_REDUCE)) == [(4, 0), (1, 2)]


def test_a_flat_collective_waits_its_turn_between_groups() -> None:
    order = Order(is_overlapped=True)
    turns = [*order.submit((SCATTER_INSIDE, SCATTER_BETWEEN)), *order.submit(FLAT), *order.submit((GATHER_BETWEEN,))]
    assert on(Track.BETWEEN, turns) == [(0, 1), (1, 0), (2, 0)] and on(Track.INSIDE, turns) == [(0, 0)]


def test_one_link_holds_nothing_back() -> None:
    order = Order(is_overlapped=False)
    assert [turn.track for turn in order.submit(ALL_REDUCE)] == [Track.BETWEEN] * 3
    assert [turn.phase for turn in order.submit(FLAT)] == list(FLAT)


def test_no_lag_is_refused() -> None:
    with pytest.raises(ValueError, match="after 0 more: give at least 1"):
        Order(is_overlapped=True, lag=0)


def clock(turns: list[Turn], links: Links) -> float:
    """Return when the last of them is done, each starting when its link and its job's phase before it are."""
    free: dict[Track, float] = dict.fromkeys(Track, 0.0)
    reached: dict[int, float] = {}
    for turn in turns:
        begin = max(free[turn.track], reached.get(turn.job, 0.0))
        free[turn.track] = reached[turn.job] = begin + links.seconds(turn.phase, GROUPS, 1.0)
    return max(reached.values())


@given(kinds, st.integers(1, 12), st.floats(0.05, 20), st.integers(1, 3))
def test_coming_back_soon_costs_one_phase_inside_at_most(kind: Kind, buckets: int, slower: float, lag: int) -> None:
    """The plan comes back when all have started: best for a batch, worst for buckets that come one by one."""
    links = Links(Link(6.0), Link(6.0 / slower))
    phases = whole(kind, GROUPS, Mode.OVERLAPPED)
    best = max(span.end for span in simulate(phases, GROUPS, links, [1.0] * buckets, is_overlapped=True))
    inside = links.seconds(GATHER_INSIDE, GROUPS, 1.0)
    taken = clock(batch(phases, buckets, lag=lag), links)
    assert taken <= best + inside * (1 + 1e-9)
    if buckets <= lag or kind is not Kind.ALL_REDUCE:
        assert taken == pytest.approx(best)


@given(st.lists(st.sampled_from([ALL_REDUCE, ALL_REDUCE[:2], ALL_REDUCE[1:], FLAT]), max_size=9), st.integers(1, 4))
def test_every_phase_goes_once_and_after_the_one_before_it(jobs: list[Phases], lag: int) -> None:
    order, turns = Order(is_overlapped=True, lag=lag), []
    for job, phases in enumerate(jobs):
        turns += order.submit(phases)
        turns += order.flush(job) if job % 3 == 2 else []
    turns += order.flush(len(jobs))
    for job, phases in enumerate(jobs):
        went = [(turn.turn, turn.phase) for turn in turns if turn.job == job]
        assert all(a == b for a, b in zip_longest(went, enumerate(phases)))
