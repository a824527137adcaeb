"""The overlapping ring: proven by symbolic execution, wrong ones refused, timed against closed forms."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.sharding.plan.collectives import Kind, Scope
from megatron.longseq.sharding.plan.comm_volume import volume
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.ring import Mode, Plan, Step, plan_ring, whole
from megatron.longseq.sharding.plan.ring_proof import PlanError, equals_flat, execute, prove
from megatron.longseq.sharding.plan.time_model import Choice, Link, Links, choose, seconds, simulate

GROUPS = Groups(6, 3)
kinds, modes = st.sampled_from(list(Kind)), st.sampled_from(list(Mode))


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("size", range(1, 9))
def test_every_plan_up_to_8_groups_of_8_is_its_collective(kind: Kind, mode: Mode, size: int) -> None:
    for count in range(1, 9):
        groups = Groups(size * count, size)
        if mode is Mode.FLAT and 16 < groups.ranks < 64:
            continue  # a flat ring knows no groups but in the order of its shards
        plan = plan_ring(groups, kind, mode, buckets=2)
        proof = prove(plan)
        assert groups.ranks > 16 or equals_flat(plan)
        sent = volume(whole(kind, groups, mode), groups, 1)
        assert proof.sent == {
            Scope.INSIDE: 2 * sent.inside,
            Scope.BETWEEN: 2 * sent.between,
            Scope.FLAT: 2 * sent.flat,
        }
        assert sum(proof.sent.values()) == 2 * (groups.ranks - 1) * (2 if kind is Kind.ALL_REDUCE else 1)


@given(st.integers(1, 4), st.integers(1, 4), kinds, modes, st.integers(1, 5))
def test_any_number_of_buckets(size: int, count: int, kind: Kind, mode: Mode, buckets: int) -> None:
    plan = plan_ring(Groups(size * count, size), kind, mode, buckets)
    proof = prove(plan)
    assert equals_flat(plan)
    assert {run.bucket for run in plan.runs} == (set(range(buckets)) if size * count > 1 else set())
    if mode is not Mode.OVERLAPPED:
        assert proof.shared == 0
    elif size > 1 and count > 1:
        phases = len(whole(kind, plan.groups, mode))
        assert proof.shared >= buckets - 1 and proof.slots + proof.shared == phases * buckets


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Kind.ALL_GATHER, [("between", 0), ("between", 1, "inside", 0), ("between", 2, "inside", 1), ("inside", 2)]),
        (
            Kind.REDUCE_SCATTER,
            [("inside", 0), ("between", 0, "inside", 1), ("between", 1, "inside", 2), ("between", 2)],
        ),
    ],
)
def test_what_runs_when(kind: Kind, expected: list[tuple]) -> None:
    """Inside groups a bucket is one slot before or behind what runs between them."""
    slots: dict[int, list[tuple[str, int]]] = {}
    for run in plan_ring(GROUPS, kind, Mode.OVERLAPPED, 3).runs:
        slots.setdefault(run.slot, []).append((run.phase.scope.value, run.bucket))
    assert [tuple(word for pair in sorted(slots[slot]) for word in pair) for slot in range(4)] == expected


def test_an_all_reduce_keeps_the_link_inside_groups_busy() -> None:
    runs = plan_ring(GROUPS, Kind.ALL_REDUCE, Mode.OVERLAPPED, 4).runs
    inside = [run.slot for run in runs if run.phase.scope is Scope.INSIDE]
    assert inside == list(range(8))
    assert [run.slot for run in runs if run.phase.scope is Scope.BETWEEN] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", Kind)
def test_messages_are_contiguous_and_never_wrap(kind: Kind) -> None:
    plan = plan_ring(GROUPS, kind, Mode.OVERLAPPED, 2)
    width = {Scope.INSIDE: 2, Scope.BETWEEN: 1}
    for steps in plan.steps:
        for step in steps:
            for piece in (step.send, step.receive):
                assert piece.end - piece.begin == width[step.run.phase.scope]
                assert 0 <= piece.begin < piece.end <= GROUPS.ranks


def test_a_flat_ring_leaves_each_group_once_a_step() -> None:
    for step in zip(*plan_ring(GROUPS, Kind.ALL_GATHER, Mode.FLAT).steps, strict=True):
        crossing = [member for member, each in enumerate(step) if member // 3 != each.send.peer // 3]
        assert crossing == [2, 5]


def altered(plan: Plan, member: int, change: Callable[[Step], Step | None]) -> Plan:
    """A plan whose member does something else in some steps (None: not at all)."""
    steps = list(plan.steps)
    steps[member] = tuple(new for step in steps[member] if (new := change(step)) is not None)
    return replace(plan, steps=tuple(steps))


def send(step: Step, **changes: object) -> Step:
    return step._replace(send=step.send._replace(**changes))


PLAN = plan_ring(GROUPS, Kind.REDUCE_SCATTER, Mode.OVERLAPPED, 2)
GATHER = plan_ring(GROUPS, Kind.ALL_GATHER, Mode.OVERLAPPED, 2)
LONE = plan_ring(GROUPS, Kind.ALL_GATHER, Mode.OVERLAPPED)
REDUCE = plan_ring(GROUPS, Kind.ALL_REDUCE, Mode.OVERLAPPED, 2)


def overwriting(step: Step, adds: bool = False) -> Step:
    return send(step, adds=adds)._replace(receive=step.receive._replace(adds=adds))


def later(step: Step) -> Step:
    return step._replace(number=99)


def adding(step: Step) -> Step:
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
        (replace(LONE, runs=tuple(run._replace(slot=0) for run in LONE.runs)), "another phase of the bucket runs"),
        (replace(PLAN, runs=(PLAN.runs[0]._replace(slot=9), *PLAN.runs[1:])), "listed after slot 9"),
        (replace(PLAN, runs=PLAN.runs[:-1]), "buckets have different numbers of phases"),
        (replace(PLAN, kind=Kind.ALL_REDUCE), "it ends with"),
        (replace(PLAN, groups=Groups(6, 2)), "a peer that is not of"),
        (replace(GATHER, kind=Kind.REDUCE_SCATTER), "it ends with"),
        (replace(GATHER, steps=tuple((*steps, later(steps[-1])) for steps in GATHER.steps)), "was at . before"),
        (replace(PLAN, steps=tuple(tuple(map(overwriting, steps)) for steps in PLAN.steps)), "it ends with"),
        (replace(REDUCE, steps=tuple(tuple(map(adding, steps)) for steps in REDUCE.steps)), "counted twice"),
    ],
)
def test_wrong_plans_are_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        prove(plan)


def test_a_swapped_ring_is_still_agreed_on_but_gathers_what_is_not_there() -> None:
    """Both sides agree on a wrong piece: only the execution can tell."""

    def moved(step: Step) -> Step:
        piece = (step.send.begin + 1) % 6, (step.receive.begin + 1) % 6
        return step._replace(
            send=step.send._replace(begin=piece[0], end=piece[0] + 1),
            receive=step.receive._replace(begin=piece[1], end=piece[1] + 1),
        )

    plan = plan_ring(GROUPS, Kind.ALL_GATHER, Mode.FLAT)
    wrong = replace(plan, steps=tuple(tuple(map(moved, steps)) for steps in plan.steps))
    with pytest.raises(PlanError, match="is not there yet"):
        prove(wrong)


def test_execution_without_the_phase_between_groups_holds_sums_of_a_group_alone() -> None:
    inside = tuple(tuple(step for step in steps if step.run.phase.scope is Scope.INSIDE) for steps in PLAN.steps)
    runs = tuple(run for run in PLAN.runs if run.phase.scope is Scope.INSIDE)
    state = execute(replace(PLAN, steps=inside, runs=runs))
    assert state[0][0][0] == 0b111
    with pytest.raises(PlanError, match=r"ends with \[0, 1, 2\], not \[0, 1, 2, 3, 4, 5\]"):
        prove(replace(PLAN, steps=inside, runs=runs))


def test_no_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="of 0 buckets: give at least 1"):
        plan_ring(GROUPS, Kind.ALL_GATHER, Mode.FLAT, 0)


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
    groups = Groups(8 * count, 8)
    links = Links(Link(200e9, 3e-6), Link(speed * 1e9, 15e-6), channels=8)
    shard = size / groups.ranks
    for mode, published in ((Mode.FLAT, flat), (Mode.HIERARCHICAL, serial)):
        figure = 1e3 * seconds(Kind.ALL_GATHER, mode, groups, links, [shard])
        assert figure == pytest.approx(published, abs=0.0051 if published < 10 else 0.051)
    inside, between = 7 * (3e-6 + size / 8 / 200e9), (count - 1) * (15e-6 + shard / speed / 1e9)
    closed = max(inside, between) + min(inside, between) / 8 + 8 * 3e-6
    assert 1e3 * closed == pytest.approx(overlapped, abs=0.0051 if overlapped < 8 else 0.051)
    ours = seconds(Kind.ALL_GATHER, Mode.OVERLAPPED, groups, links, [shard / 8] * 8)
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
    size: int, count: int, kind: Kind, buckets: int, inside: float, between: float, latency: float
) -> None:
    groups, links = Groups(size * count, size), Links(Link(inside, latency), Link(between, latency), size)
    phases, shards = whole(kind, groups, Mode.OVERLAPPED), [10.0] * buckets
    spans = simulate(phases, groups, links, shards, is_overlapped=True)
    serial = seconds(kind, Mode.HIERARCHICAL, groups, links, shards)
    total = max(span.end for span in spans)
    busy = {scope: sum(span.end - span.begin for span in spans if span.run.phase.scope is scope) for scope in Scope}
    one = sum(links.seconds(phase, groups, 10.0) for phase in phases)
    assert serial == pytest.approx(buckets * one) and serial == pytest.approx(sum(busy.values()))
    assert max(*busy.values(), one) <= total * (1 + 1e-9) and total <= serial * (1 + 1e-9)
    if kind is not Kind.ALL_REDUCE:
        assert total == pytest.approx(max(busy.values()) + one - max(busy.values()) / buckets)
    for scope in Scope:
        line = [span for span in spans if span.run.phase.scope is scope]
        assert all(left.end <= right.begin for left, right in pairwise(line)), "a link carries one phase at a time"
    for bucket in range(buckets):
        chain = [span for span in spans if span.run.bucket == bucket]
        assert all(left.end <= right.begin for left, right in pairwise(chain))


def test_buckets_are_not_sent_before_they_are_there() -> None:
    links = Links(Link(1.0), Link(1.0))
    phases = whole(Kind.REDUCE_SCATTER, Groups(4, 2), Mode.OVERLAPPED)
    spans = simulate(phases, Groups(4, 2), links, [1.0, 1.0], is_overlapped=True, ready=[5.0, 0.0])
    assert [(span.run.bucket, span.begin) for span in spans if span.run.turn == 0] == [(0, 5.0), (1, 7.0)]
    with pytest.raises(ValueError, match="1 times at which buckets are there, for 2"):
        simulate(phases, Groups(4, 2), links, [1.0, 1.0], is_overlapped=True, ready=[0.0])


def test_a_flat_ring_goes_at_the_pace_of_its_slowest_hop() -> None:
    links = Links(Link(100.0, 1.0), Link(10.0, 2.0), channels=2)
    flat = whole(Kind.ALL_GATHER, Groups(4, 2), Mode.FLAT)[0]
    assert links.seconds(flat, Groups(4, 2), 20.0) == 3 * (2.0 + 20.0 / 20.0)
    assert links.seconds(flat, Groups(4, 4), 20.0) == pytest.approx(3 * (1.0 + 0.2))
    assert links.seconds(flat, Groups(4, 1), 20.0) == 3 * (2.0 + 2.0), "a group of one rank has one link"
    slow = Links(Link(1.0), Link(1000.0), channels=2)
    assert slow.seconds(flat, Groups(4, 2), 20.0) == 3 * 20.0


@pytest.mark.parametrize("kind", Kind)
def test_it_wins_where_links_differ_and_falls_back_where_they_do_not(kind: Kind) -> None:
    groups = Groups(4, 2)
    shared = Links(Link(1e9, 1e-5), Link(5e7, 5e-5), channels=2)  # one link of 1e8 between two nodes of two ranks
    best = choose(kind, groups, shared, 64 * 2**20)
    assert best.mode is Mode.OVERLAPPED and best.buckets > 1 and best.speedup > 1.3
    serial = seconds(kind, Mode.HIERARCHICAL, groups, shared, [16 * 2**20])
    assert serial > best.seconds
    fast = Links(Link(200e9, 3e-6), Link(25e9, 15e-6), channels=8)  # a flat ring over 8 network cards is hard to beat
    margin = 0.2 if kind is Kind.ALL_REDUCE else 0.05
    fallback = choose(kind, Groups(16, 8), fast, 512 * 10**6, margin=margin)
    assert (fallback.mode, fallback.seconds) == (Mode.FLAT, fallback.flat)
    for single in (Groups(4, 1), Groups(4, 4)):
        assert choose(kind, single, shared, 2**20).mode is Mode.FLAT, "there is one level alone"
    assert choose(kind, Groups(1, 1), shared, 2**20) == Choice(Mode.FLAT, 1, 0.0, 0.0)
    assert choose(kind, Groups(1, 1), shared, 2**20).speedup == 1.0


@given(kinds, st.integers(1, 8), st.integers(1, 8), st.floats(1e6, 1e12), st.floats(1e6, 1e12), st.integers(1, 10**9))
def test_what_is_chosen_is_never_predicted_to_be_slower_than_flat(
    kind: Kind, size: int, count: int, inside: float, between: float, message: int
) -> None:
    groups, links = Groups(size * count, size), Links(Link(inside, 3e-6), Link(between, 15e-6), size)
    best = choose(kind, groups, links, message, buckets=(1, 4, 16))
    assert best.seconds <= best.flat
    assert best.mode is Mode.FLAT or best.seconds * 1.05 < best.flat
    shard = message / groups.ranks
    assert best.seconds == pytest.approx(seconds(kind, best.mode, groups, links, [shard / best.buckets] * best.buckets))


@pytest.mark.parametrize(
    "wrong",
    [lambda: Link(0.0), lambda: Link(1.0, -1.0), lambda: Link(float("nan")), lambda: Links(Link(1.0), Link(1.0), 0)],
)
def test_links_that_are_none_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"give a speed and a latency|give at least 1"):
        wrong()


def test_a_choice_needs_numbers_of_buckets() -> None:
    for none in ((), (0,)):
        with pytest.raises(ValueError, match="give numbers from 1"):
            choose(Kind.ALL_GATHER, GROUPS, Links(Link(1.0), Link(1.0)), 100, buckets=none)
