"""The overlapping ring is proven by symbolic execution, wrong plans are refused, and times equal closed forms."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.sharding.plan.collectives import CollectiveKind, CollectivesMode, Scope, full_collective
from megatron.longseq.sharding.plan.comm_volume import volume
from megatron.longseq.sharding.plan.flat_or_hierarchical import choose_mode
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import LinkSpeed, LinkSpeeds, ring_seconds, time_collectives
from tests.unit.ring_proof import (
    PlanError,
    PlannedMessage,
    RingCollective,
    equals_flat,
    execute,
    plan_ring_collective,
    prove,
)

GROUPS = RankGroups(6, 3)
kinds, modes = st.sampled_from(list(CollectiveKind)), st.sampled_from(list(CollectivesMode))


@pytest.mark.parametrize("kind", CollectiveKind)
@pytest.mark.parametrize("mode", CollectivesMode)
@pytest.mark.parametrize("size", range(1, 9))
def test_every_plan_up_to_8_groups_of_8_is_its_collective(
    kind: CollectiveKind, mode: CollectivesMode, size: int
) -> None:
    for count in range(1, 9):
        groups = RankGroups(size * count, size)
        if mode is CollectivesMode.FLAT and 16 < groups.ranks < 64:
            continue  # a flat ring knows no groups but in the order of its shards
        plan = plan_ring_collective(groups, kind, mode, buckets=2)
        proof = prove(plan)
        assert groups.ranks > 16 or equals_flat(plan)
        sent = volume(full_collective(kind, groups, mode), groups, 1)
        assert proof.sent == {
            Scope.INSIDE: 2 * sent.inside,
            Scope.BETWEEN: 2 * sent.between,
            Scope.FLAT: 2 * sent.flat,
        }
        assert sum(proof.sent.values()) == 2 * (groups.ranks - 1) * (2 if kind is CollectiveKind.ALL_REDUCE else 1)


@given(st.integers(1, 4), st.integers(1, 4), kinds, modes, st.integers(1, 5))
def test_any_number_of_buckets(
    size: int, count: int, kind: CollectiveKind, mode: CollectivesMode, buckets: int
) -> None:
    plan = plan_ring_collective(RankGroups(size * count, size), kind, mode, buckets)
    proof = prove(plan)
    assert equals_flat(plan)
    assert {run.bucket for run in plan.runs} == (set(range(buckets)) if size * count > 1 else set())
    if mode is not CollectivesMode.OVERLAPPED:
        assert proof.shared == 0
    elif size > 1 and count > 1:
        collectives = len(full_collective(kind, plan.groups, mode))
        assert proof.shared >= buckets - 1 and proof.slots + proof.shared == collectives * buckets


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            CollectiveKind.ALL_GATHER,
            [("between", 0), ("between", 1, "inside", 0), ("between", 2, "inside", 1), ("inside", 2)],
        ),
        (
            CollectiveKind.REDUCE_SCATTER,
            [("inside", 0), ("between", 0, "inside", 1), ("between", 1, "inside", 2), ("between", 2)],
        ),
    ],
)
def test_what_runs_when(kind: CollectiveKind, expected: list[tuple]) -> None:
    """Inside groups, a bucket is one slot before or after its phase between groups."""
    slots: dict[int, list[tuple[str, int]]] = {}
    for run in plan_ring_collective(GROUPS, kind, CollectivesMode.OVERLAPPED, 3).runs:
        slots.setdefault(run.slot, []).append((run.collective.scope.value, run.bucket))
    assert [tuple(word for pair in sorted(slots[slot]) for word in pair) for slot in range(4)] == expected


def test_an_all_reduce_keeps_the_link_inside_groups_busy() -> None:
    runs = plan_ring_collective(GROUPS, CollectiveKind.ALL_REDUCE, CollectivesMode.OVERLAPPED, 4).runs
    inside = [run.slot for run in runs if run.collective.scope is Scope.INSIDE]
    assert inside == list(range(8))
    assert [run.slot for run in runs if run.collective.scope is Scope.BETWEEN] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", CollectiveKind)
def test_messages_are_contiguous_and_never_wrap(kind: CollectiveKind) -> None:
    plan = plan_ring_collective(GROUPS, kind, CollectivesMode.OVERLAPPED, 2)
    width = {Scope.INSIDE: 2, Scope.BETWEEN: 1}
    for steps in plan.steps:
        for step in steps:
            for piece in (step.send, step.receive):
                assert piece.end - piece.begin == width[step.run.collective.scope]
                assert 0 <= piece.begin < piece.end <= GROUPS.ranks


def test_a_flat_ring_leaves_each_group_once_a_step() -> None:
    for step in zip(*plan_ring_collective(GROUPS, CollectiveKind.ALL_GATHER, CollectivesMode.FLAT).steps, strict=True):
        crossing = [member for member, each in enumerate(step) if member // 3 != each.send.peer // 3]
        assert crossing == [2, 5]


def altered(
    plan: RingCollective, member: int, change: Callable[[PlannedMessage], PlannedMessage | None]
) -> RingCollective:
    """Return a plan whose member does something else in some steps, or nothing (None)."""
    steps = list(plan.steps)
    steps[member] = tuple(new for step in steps[member] if (new := change(step)) is not None)
    return replace(plan, steps=tuple(steps))


def send(step: PlannedMessage, **changes: object) -> PlannedMessage:
    return step._replace(send=step.send._replace(**changes))


PLAN = plan_ring_collective(GROUPS, CollectiveKind.REDUCE_SCATTER, CollectivesMode.OVERLAPPED, 2)
GATHER = plan_ring_collective(GROUPS, CollectiveKind.ALL_GATHER, CollectivesMode.OVERLAPPED, 2)
SINGLE = plan_ring_collective(GROUPS, CollectiveKind.ALL_GATHER, CollectivesMode.OVERLAPPED)
REDUCE = plan_ring_collective(GROUPS, CollectiveKind.ALL_REDUCE, CollectivesMode.OVERLAPPED, 2)


def overwriting(step: PlannedMessage, adds: bool = False) -> PlannedMessage:
    return send(step, adds=adds)._replace(receive=step.receive._replace(adds=adds))


def later(step: PlannedMessage) -> PlannedMessage:
    return step._replace(number=99)


def adding(step: PlannedMessage) -> PlannedMessage:
    return overwriting(step, adds=True)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (altered(PLAN, 1, lambda step: None if step == PLAN.steps[1][0] else step), "4 messages to 1, which awaits 3"),
        (altered(PLAN, 0, lambda step: send(step, begin=0, end=2)), "but 1 awaits"),
        (altered(PLAN, 0, lambda step: send(step, adds=not step.send.adds)), "but 1 awaits"),
        (altered(PLAN, 0, lambda step: send(step, peer=0)), "a message to itself"),
        (altered(PLAN, 0, lambda step: send(step, peer=4)), "a peer that is not of"),
        (replace(PLAN, steps=tuple((*steps, steps[0]) for steps in PLAN.steps)), "two messages inside groups at once"),
        (
            replace(PLAN, steps=(PLAN.steps[0], *(steps[::-1] for steps in PLAN.steps[1:]))),
            "member 1 runs other phases",
        ),
        (replace(PLAN, steps=tuple(steps[:-1] for steps in PLAN.steps)), "member 0 runs other phases"),
        (replace(PLAN, runs=PLAN.runs[::-1]), "phase 1 of the bucket comes where its phase 0 is due"),
        (replace(PLAN, runs=tuple(run._replace(slot=0) for run in PLAN.runs)), "the link is busy with bucket 0"),
        (replace(PLAN, runs=tuple(run._replace(slot=run.bucket) for run in PLAN.runs)), "listed after slot 1"),
        (
            replace(SINGLE, runs=tuple(run._replace(slot=0) for run in SINGLE.runs)),
            "another phase of the bucket runs",
        ),
        (replace(PLAN, runs=(PLAN.runs[0]._replace(slot=9), *PLAN.runs[1:])), "listed after slot 9"),
        (replace(PLAN, runs=PLAN.runs[:-1]), "buckets have different numbers of phases"),
        (replace(PLAN, kind=CollectiveKind.ALL_REDUCE), "it ends with"),
        (replace(PLAN, groups=RankGroups(6, 2)), "a peer that is not of"),
        (replace(GATHER, kind=CollectiveKind.REDUCE_SCATTER), "it ends with"),
        (replace(GATHER, steps=tuple((*steps, later(steps[-1])) for steps in GATHER.steps)), "was at . before"),
        (replace(PLAN, steps=tuple(tuple(map(overwriting, steps)) for steps in PLAN.steps)), "it ends with"),
        (replace(REDUCE, steps=tuple(tuple(map(adding, steps)) for steps in REDUCE.steps)), "counted twice"),
    ],
)
def test_wrong_plans_are_refused(plan: RingCollective, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        prove(plan)


def test_a_swapped_ring_is_still_agreed_on_but_gathers_what_is_not_there() -> None:
    """Both sides agree on a wrong piece, so only the execution shows the error."""

    def moved(step: PlannedMessage) -> PlannedMessage:
        piece = (step.send.begin + 1) % 6, (step.receive.begin + 1) % 6
        return step._replace(
            send=step.send._replace(begin=piece[0], end=piece[0] + 1),
            receive=step.receive._replace(begin=piece[1], end=piece[1] + 1),
        )

    plan = plan_ring_collective(GROUPS, CollectiveKind.ALL_GATHER, CollectivesMode.FLAT)
    wrong = replace(plan, steps=tuple(tuple(map(moved, steps)) for steps in plan.steps))
    with pytest.raises(PlanError, match="is not there yet"):
        prove(wrong)


def test_execution_without_the_phase_between_groups_holds_sums_of_a_group_alone() -> None:
    inside = tuple(tuple(step for step in steps if step.run.collective.scope is Scope.INSIDE) for steps in PLAN.steps)
    runs = tuple(run for run in PLAN.runs if run.collective.scope is Scope.INSIDE)
    state = execute(replace(PLAN, steps=inside, runs=runs))
    assert state[0][0][0] == 0b111
    with pytest.raises(PlanError, match=r"ends with \[0, 1, 2\], not \[0, 1, 2, 3, 4, 5\]"):
        prove(replace(PLAN, steps=inside, runs=runs))


# All-gather in ms with m = 8, 200 GB/s, latencies 15 and 3 us: bytes, groups, GB/s between; multi-rail flat, serial,
# and the closed form of the overlapped one, which counts the inner ring's latency once per bucket of 8.
PUBLISHED = [
    (512e6, 2, 25, 2.62, 3.56, 2.45),
    (512e6, 4, 25, 2.95, 4.23, 2.53),
    (512e6, 16, 25, 4.45, 4.89, 2.93),
    (512e6, 2, 6.25, 9.82, 7.40, 5.44),
    (512e6, 4, 6.25, 10.4, 10.0, 8.0),
    (512e6, 16, 6.25, 12.1, 12.1, 10.1),
    (64e6, 16, 25, 2.22, 0.83, 0.59),
]


@pytest.mark.parametrize(("size", "count", "speed", "flat", "serial", "overlapped"), PUBLISHED)
def test_the_published_times(
    size: float, count: int, speed: float, flat: float, serial: float, overlapped: float
) -> None:
    groups = RankGroups(8 * count, 8)
    links = LinkSpeeds(LinkSpeed(200e9, 3e-6), LinkSpeed(speed * 1e9, 15e-6), channels=8)
    shard = size / groups.ranks
    for mode, published in ((CollectivesMode.FLAT, flat), (CollectivesMode.HIERARCHICAL, serial)):
        figure = 1e3 * ring_seconds(CollectiveKind.ALL_GATHER, mode, groups, links, [shard])
        assert figure == pytest.approx(published, abs=0.0051 if published < 10 else 0.051)
    inside, between = 7 * (3e-6 + size / 8 / 200e9), (count - 1) * (15e-6 + shard / speed / 1e9)
    closed = max(inside, between) + min(inside, between) / 8 + 8 * 3e-6
    assert 1e3 * closed == pytest.approx(overlapped, abs=0.0051 if overlapped < 8 else 0.051)
    ours = ring_seconds(CollectiveKind.ALL_GATHER, CollectivesMode.OVERLAPPED, groups, links, [shard / 8] * 8)
    paid = 7 * (7 * 3e-6 if inside > between else (count - 1) * 15e-6)  # every bucket's latency on the busier link
    assert ours == pytest.approx(closed - 8 * 3e-6 + paid + min(inside, between) * 0, rel=0.05)


@given(
    st.integers(2, 5),
    st.integers(2, 5),
    kinds,
    st.integers(1, 6),
    st.floats(1, 100),
    st.floats(1, 100),
    st.floats(0, 1),
)
def test_the_clock_lies_between_its_bounds(
    size: int, count: int, kind: CollectiveKind, buckets: int, inside: float, between: float, latency: float
) -> None:
    groups, links = (
        RankGroups(size * count, size),
        LinkSpeeds(LinkSpeed(inside, latency), LinkSpeed(between, latency), size),
    )
    collectives, shards = full_collective(kind, groups, CollectivesMode.OVERLAPPED), [10.0] * buckets
    spans = time_collectives(collectives, groups, links, shards, is_overlapped=True)
    serial = ring_seconds(kind, CollectivesMode.HIERARCHICAL, groups, links, shards)
    total = max(span.end for span in spans)
    busy = {
        scope: sum(span.end - span.begin for span in spans if span.run.collective.scope is scope) for scope in Scope
    }
    one = sum(links.seconds(collective, groups, 10.0) for collective in collectives)
    assert serial == pytest.approx(buckets * one) and serial == pytest.approx(sum(busy.values()))
    assert max(*busy.values(), one) <= total * (1 + 1e-9) and total <= serial * (1 + 1e-9)
    if kind is not CollectiveKind.ALL_REDUCE:
        assert total == pytest.approx(max(busy.values()) + one - max(busy.values()) / buckets)
    for scope in Scope:
        line = [span for span in spans if span.run.collective.scope is scope]
        assert all(left.end <= right.begin for left, right in pairwise(line)), "a link carries one phase at a time"
    for bucket in range(buckets):
        chain = [span for span in spans if span.run.bucket == bucket]
        assert all(left.end <= right.begin for left, right in pairwise(chain))


def test_a_flat_ring_goes_at_the_pace_of_its_slowest_hop() -> None:
    links = LinkSpeeds(LinkSpeed(100.0, 1.0), LinkSpeed(10.0, 2.0), channels=2)
    flat = full_collective(CollectiveKind.ALL_GATHER, RankGroups(4, 2), CollectivesMode.FLAT)[0]
    assert links.seconds(flat, RankGroups(4, 2), 20.0) == 3 * (2.0 + 20.0 / 20.0)
    assert links.seconds(flat, RankGroups(4, 4), 20.0) == pytest.approx(3 * (1.0 + 0.2))
    assert links.seconds(flat, RankGroups(4, 1), 20.0) == 3 * (2.0 + 2.0), "a group of one rank has one link"
    slow = LinkSpeeds(LinkSpeed(1.0), LinkSpeed(1000.0), channels=2)
    assert slow.seconds(flat, RankGroups(4, 2), 20.0) == 3 * 20.0


@pytest.mark.parametrize("kind", CollectiveKind)
def test_it_wins_where_links_differ_and_falls_back_where_they_do_not(kind: CollectiveKind) -> None:
    groups = RankGroups(4, 2)
    shared = LinkSpeeds(LinkSpeed(1e9, 1e-5), LinkSpeed(5e7, 5e-5), channels=2)  # two nodes of two ranks share 1e8
    shards = [2**21] * 8
    assert choose_mode(kind, groups, shared, shards) is CollectivesMode.OVERLAPPED
    times = {mode: ring_seconds(kind, mode, groups, shared, shards) for mode in CollectivesMode}
    assert times[CollectivesMode.FLAT] > 1.3 * times[CollectivesMode.OVERLAPPED]
    assert times[CollectivesMode.HIERARCHICAL] > times[CollectivesMode.OVERLAPPED]
    fast = LinkSpeeds(LinkSpeed(200e9, 3e-6), LinkSpeed(25e9, 15e-6), channels=8)  # a flat ring over 8 network cards
    margin = 0.2 if kind is CollectiveKind.ALL_REDUCE else 0.05
    assert choose_mode(kind, RankGroups(16, 8), fast, [32e6], margin=margin) is CollectivesMode.FLAT
    for single in (RankGroups(4, 1), RankGroups(4, 4), RankGroups(1, 1)):
        assert choose_mode(kind, single, shared, shards) is CollectivesMode.FLAT, "there is one level alone"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LinkSpeed(0.0),
        lambda: LinkSpeed(1.0, -1.0),
        lambda: LinkSpeed(float("nan")),
        lambda: LinkSpeeds(LinkSpeed(1.0), LinkSpeed(1.0), 0),
    ],
)
def test_links_that_are_none_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"they must be > 0|give at least 1"):
        wrong()
