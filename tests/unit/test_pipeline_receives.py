"""Receives are posted early, but not before the messages that they depend on, and do not deadlock on one queue."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import product
from types import SimpleNamespace

import pytest

from megatron.longseq.pipeline.forward_backward import ForwardBackward
from megatron.longseq.pipeline.plan.from_args import PipelinePlan
from megatron.longseq.pipeline.plan.generators import forward_only, make
from megatron.longseq.pipeline.plan.receives import (
    AHEAD,
    ReceiveOrder,
    is_deadlock_free_on_one_queue,
    plan_receives,
    plan_synchronized_receives,
)
from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Pipeline, Schedule, source, target
from megatron.longseq.pipeline.runtime import p2p
from megatron.longseq.pipeline.runtime.p2p import StageChannels

F, B = ActionKind.FORWARD, ActionKind.BACKWARD


def schedules() -> list[Schedule]:
    made = []
    for stages, splits, virtual, slack in product((2, 3, 4), (1, 4), (1, 2), (0, 3)):
        pipeline = Pipeline(stages, 8, splits, virtual)
        try:
            made += [make(pipeline, slack=slack), forward_only(pipeline)]
        except ValueError:
            continue
    made += [make(Pipeline(4, 8, 2), zero_bubble=True)]
    return made


def ancestors(schedule: Schedule, rank: int, action: Action) -> set[tuple[int, Action]]:
    """Return all actions that must precede an action, by walking back."""
    before = [dict(zip(order[1:], order, strict=False)) for order in schedule.orders]
    seen: set[tuple[int, Action]] = set()
    open_ends = [(rank, action)]
    while open_ends:
        rank, action = open_ends.pop()
        steps = [source(schedule.pipeline, rank, action)]
        steps += [(rank, before[rank][action])] if action in before[rank] else []
        for step in steps:
            if step is not None and step not in seen:
                seen.add(step)
                open_ends.append(step)
    return seen


@pytest.mark.parametrize("schedule", schedules()[::5], ids=lambda one: f"{one.name} {one.pipeline}")
def test_nothing_is_posted_before_what_it_depends_on_is_issued(schedule: Schedule) -> None:
    for rank, (order, posts) in enumerate(zip(schedule.orders, plan_receives(schedule), strict=True)):
        for index, early in enumerate(posts):
            for action in early:
                sender = source(schedule.pipeline, rank, action)
                assert sender is not None
                needed = {a for place, a in (sender, *ancestors(schedule, *sender)) if place == rank}
                assert needed <= set(order[:index])


def test_every_message_is_posted_once_in_order_and_in_time() -> None:
    for schedule in schedules():
        pipeline = schedule.pipeline
        for rank, (order, posts) in enumerate(zip(schedule.orders, plan_receives(schedule), strict=True)):
            on_the_way: list[Action] = []
            due: dict[object, list[Action]] = {}
            for action in order:
                sender = source(pipeline, rank, action)
                if sender is not None and sender[0] != rank:
                    due.setdefault((action.kind, sender[0]), []).append(action)
            for action, early in zip(order, posts, strict=True):
                for one in early:
                    assert due[one.kind, source(pipeline, rank, one)[0]].pop(0) == one  # type: ignore[index]
                on_the_way += early
                for channel in due:
                    alike = [a for a in on_the_way if (a.kind, source(pipeline, rank, a)[0]) == channel]  # type: ignore[index]
                    assert len(alike) <= AHEAD
                sender = source(pipeline, rank, action)
                if sender is not None and sender[0] != rank:
                    on_the_way.remove(action)
            assert not on_the_way and not any(due.values())


def test_a_first_stage_waits_for_no_gradient_before_its_last_warm_up_forward() -> None:
    schedule = make(Pipeline(2, 4))
    assert schedule.orders[0][:3] == (Action(F, 0), Action(F, 1), Action(B, 0))
    assert plan_receives(schedule)[0][:4] == ((), (Action(B, 0),), (Action(B, 1),), ())


Channel = tuple[int, int, ActionKind]
Given = tuple[str, Action, Channel]


def given(schedule: Schedule, rank: int, ahead: int) -> Iterator[Given]:
    """Return what a rank submits to its GPU, in order."""
    pipeline = schedule.pipeline
    origins = {
        (other, theirs): source(pipeline, other, theirs)
        for other, order in enumerate(schedule.orders)
        for theirs in order
    }
    for action, early in zip(schedule.orders[rank], plan_receives(schedule, ahead)[rank], strict=True):
        for one in early:
            yield "receive", one, (origins[rank, one][0], rank, one.kind)  # type: ignore[index]
        sender = origins[rank, action]
        if sender is not None and sender[0] != rank:
            yield "wait", action, (sender[0], rank, action.kind)
        for (other, theirs), origin in origins.items():
            if other != rank and origin == (rank, action):
                yield "send", theirs, (rank, other, action.kind)


def rendezvous(schedule: Schedule, ahead: int) -> bool:
    """Return whether a step ends in one queue. In this model each stream holds the message that is in flight."""
    queues = [deque(given(schedule, rank, ahead)) for rank in range(schedule.pipeline.stages)]
    ran: dict[str, set[tuple[Action, Channel]]] = {"send": set(), "receive": set()}
    busy: dict[tuple[str, Channel], tuple[Action, Channel]] = {}

    def goes(what: str, action: Action, channel: Channel) -> bool:
        message, done = (action, channel), ran["send"] & ran["receive"]
        if what == "wait":
            return message in done
        if busy.get((what, channel), message) not in {*done, message}:
            return False
        busy[what, channel] = message
        ran[what].add(message)
        return True

    while any(queues):
        if not any(queue and goes(*queue[0]) and queue.popleft() for queue in queues):
            return False
    return True


@pytest.mark.parametrize("virtual", [1, 2])
def test_one_queue_is_said_to_end_where_it_does(virtual: int) -> None:
    seen = set()
    for stages, splits, slack, ahead in product((2, 3), (1, 4, 8), (0, 1, 4), (1, 2)):
        try:
            schedule = make(Pipeline(stages, 4, splits, virtual), slack=slack)
        except ValueError:
            continue
        ends = is_deadlock_free_on_one_queue(schedule, plan_receives(schedule, ahead))
        assert ends is rendezvous(schedule, ahead), (stages, splits, slack, ahead)
        seen.add(ends)
    assert seen == {True, False}


def test_a_plan_takes_what_ends_in_one_queue_or_says_what_to_give() -> None:
    plain = PipelinePlan(2, 1, (8, 8, 8, 8), one_queue=True)
    assert plain.receives(8) == plan_receives(plain.schedule(8), 1)
    slack = PipelinePlan(2, 1, (8, 8, 8, 8), slack=4, one_queue=True)
    assert slack.receives(8) == plan_receives(slack.schedule(8), 2)
    circle = PipelinePlan(2, 2, (8,) * 8, one_queue=True)
    with pytest.raises(ValueError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=1.*fewer segments or virtual stages"):
        circle.receives(4)
    assert PipelinePlan(2, 2, (8,) * 8).receives(4) == plan_receives(circle.schedule(4))


def ends_where_all_wait(schedule: Schedule, receives: Sequence[ReceiveOrder]) -> bool:
    """Return whether a step ends if every action waits for all messages that its rank has posted or sent before it."""
    ranks = range(schedule.pipeline.stages)
    origins = {
        (rank, action): sender
        for rank in ranks
        for action in schedule.orders[rank]
        if (sender := source(schedule.pipeline, rank, action)) is not None and sender[0] != rank
    }
    ended: set[tuple[int, Action]] = set()
    at = [0] * len(ranks)

    def waits(rank: int) -> bool:
        begun = [one for posts in receives[rank][: at[rank] + 1] for one in posts]
        sent = set(schedule.orders[rank][: at[rank]])
        reached = {peer: {one for posts in receives[peer][: at[peer] + 1] for one in posts} for peer in ranks}
        unsent = any(origins[rank, one] not in ended for one in begun)
        unreceived = any(
            sender[0] == rank and sender[1] in sent and one not in reached[peer]
            for (peer, one), sender in origins.items()
        )
        return unsent or unreceived

    moved = True
    while moved:
        moved = False
        for rank in ranks:
            if at[rank] < len(schedule.orders[rank]) and not waits(rank):
                ended.add((rank, schedule.orders[rank][at[rank]]))
                at[rank] += 1
                moved = True
    return at == [len(order) for order in schedule.orders]


def ends_on_shared_streams(schedule: Schedule, receives: Sequence[ReceiveOrder]) -> bool:
    """Return whether a step ends if a rank's messages of a direction run one after another, as they are submitted."""
    pipeline, ranks = schedule.pipeline, range(schedule.pipeline.stages)
    streams: dict[tuple[int, ActionKind], deque[tuple[int, Action]]] = defaultdict(deque)
    actions = [deque(order) for order in schedule.orders]
    ended: set[tuple[int, Action]] = set()
    arrived: set[tuple[int, Action]] = set()
    for rank in ranks:
        for action, posts in zip(schedule.orders[rank], receives[rank], strict=True):
            for one in posts:
                streams[rank, one.kind].append((rank, one))
            receiver = target(pipeline, rank, action)
            if receiver is not None:
                streams[rank, action.kind].append(receiver)
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while actions[rank] and (
                source(pipeline, rank, actions[rank][0]) is None or (rank, actions[rank][0]) in arrived
            ):
                ended.add((rank, actions[rank].popleft()))
                moved = True
        for stream in list(streams.values()):
            if not stream:
                continue
            rank, action = message = stream[0]
            sender = source(pipeline, rank, action)
            assert sender is not None
            ends = streams[sender[0], action.kind], streams[rank, action.kind]
            if sender in ended and all(end and end[0] == message for end in ends):
                arrived.add(message)
                moved = [end.popleft() for end in ends] != []
    return not any(actions)


SMALL = [Pipeline(2, 4), Pipeline(2, 4, 2), Pipeline(3, 4, 2), Pipeline(2, 4, 1, 2), Pipeline(2, 4, 4, 2)]


@pytest.mark.parametrize("pipeline", SMALL, ids=str)
def test_a_step_ends_where_all_ranks_wait_for_their_devices(pipeline: Pipeline) -> None:
    made = [make(pipeline), forward_only(pipeline)]
    if pipeline.virtual == 1:
        made += [make(pipeline, slack=1), make(pipeline, zero_bubble=True)]
    for schedule in made:
        receives = plan_synchronized_receives(schedule)
        assert ends_where_all_wait(schedule, receives)
        assert is_deadlock_free_on_one_queue(schedule, receives)
        for rank, order in enumerate(schedule.orders):
            due = [one for one in order if (sender := source(pipeline, rank, one)) and sender[0] != rank]
            posted = [one for posts in receives[rank] for one in posts]
            assert sorted(posted, key=str) == sorted(due, key=str)
            for kind in (F, B):  # a channel keeps the order of the actions
                assert [one for one in posted if one.kind is kind] == [one for one in due if one.kind is kind]
    early = make(pipeline)
    assert not ends_where_all_wait(early, plan_receives(early))


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_step_ends_where_messages_share_a_stream(stages: int) -> None:
    made = [make(Pipeline(stages, 8, splits), slack=slack) for splits in (1, 2, 4) for slack in (0, 2)]
    assert all(ends_on_shared_streams(one, plan_synchronized_receives(one)) for one in made)
    assert all(ends_on_shared_streams(one, plan_receives(one)) for one in made) is (stages < 4)


def test_first_steps_and_steps_with_timers_wait_for_devices() -> None:
    plan = PipelinePlan(2, 1, (8, 8))
    safe, early = plan_synchronized_receives(plan.schedule(4)), plan_receives(plan.schedule(4))
    assert safe != early
    run = ForwardBackward(plan)
    assert [run._receives(4, forward_only=False) for _ in range(2)] == [safe, early]
    assert run._receives(4, forward_only=True) == plan_synchronized_receives(plan.schedule(4, forward_only=True))
    assert run._receives(4, forward_only=False) == early
    assert PipelinePlan(2, 1, (8, 8), synchronizes=True).receives(4) == safe
    run.channels = StageChannels(None, {}, None, is_serial=True)  # type: ignore[arg-type]
    assert run._receives(4, forward_only=False) == safe


def test_messages_share_a_stream_where_nccl_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, device, shares in (("nccl", "cuda:0", True), ("nccl", None, False), ("gloo", None, False)):
        world = SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=device))
        found = SimpleNamespace(get_backend=lambda group, backend=backend: backend, group=world)
        monkeypatch.setattr(p2p, "dist", found)
        assert p2p._is_serial(None) is shares  # type: ignore[arg-type]
