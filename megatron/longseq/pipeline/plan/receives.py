"""When a rank posts its receives: early enough to overlap, and never before what they depend on is on its way.

On a GPU a receive that is posted runs until its message is there. One that depends on an action which this rank has not
issued yet would outlast everything that waits for the whole device: a timer, a kernel's first load, an autotuner.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.longseq.pipeline.plan.schedule import Action, Kind, Schedule, source, target

AHEAD = 2  # receives posted early, per direction: one in use by the running action's successor, one on its way
Posts = tuple[tuple[Action, ...], ...]  # of a rank: before each of its actions, the actions whose messages to expect


def plan_posts(schedule: Schedule, ahead: int = AHEAD) -> tuple[Posts, ...]:
    """Return per rank when it posts the receives of its actions.

    Args:
        schedule: a proven one.
        ahead: receives of one direction that may be posted and not yet taken; 1 or more.
    """
    needed = _needed(schedule)
    return tuple(_posts(schedule, rank, needed, ahead) for rank in range(schedule.pipeline.stages))


def _posts(schedule: Schedule, rank: int, needed: dict[tuple[int, Action], list[int]], ahead: int) -> Posts:
    order = schedule.orders[rank]
    due: dict[tuple[Kind, int], list[Action]] = {}
    for action in order:
        sender = source(schedule.pipeline, rank, action)
        if sender is not None and sender[0] != rank:
            due.setdefault((action.kind, sender[0]), []).append(action)
    posted, taken = dict.fromkeys(due, 0), dict.fromkeys(due, 0)
    posts: list[tuple[Action, ...]] = []
    for index, action in enumerate(order):
        now: list[Action] = []
        for lane, messages in due.items():
            while posted[lane] < min(len(messages), taken[lane] + ahead):
                sender = source(schedule.pipeline, rank, messages[posted[lane]])
                if sender is None or needed[sender][rank] >= index:
                    break
                now.append(messages[posted[lane]])
                posted[lane] += 1
        posts.append(tuple(now))
        sender = source(schedule.pipeline, rank, action)
        if sender is not None and sender[0] != rank:
            taken[action.kind, sender[0]] += 1
    return tuple(posts)


def _needed(schedule: Schedule) -> dict[tuple[int, Action], list[int]]:
    """Return for each rank's action the last action of every rank that it depends on, by index; -1: of none."""
    pipeline = schedule.pipeline
    needed: dict[tuple[int, Action], list[int]] = {}
    at = [0] * pipeline.stages
    before = [[-1] * pipeline.stages for _ in range(pipeline.stages)]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            while at[rank] < len(order):
                sender = source(pipeline, rank, order[at[rank]])
                if sender is not None and sender not in needed:
                    break
                last = before[rank] if sender is None else list(map(max, before[rank], needed[sender]))
                before[rank] = [*last[:rank], at[rank], *last[rank + 1 :]]
                needed[rank, order[at[rank]]] = before[rank]
                at[rank] += 1
                moved = True
    return needed


@dataclass(frozen=True)
class _Message:
    """One end of a message: it is done when both ends run."""

    lane: tuple[Kind, int, int]  # direction, sender, receiver: one stream at each end
    number: int
    is_sent: bool

    @property
    def other_end(self) -> "_Message":
        return _Message(self.lane, self.number, not self.is_sent)


def ends_in_one_queue(schedule: Schedule, posts: Sequence[Posts]) -> bool:
    """Return whether a step ends where all streams of a GPU share one queue (CUDA_DEVICE_MAX_CONNECTIONS=1).

    Work is then started in the order in which it was given: a message behind an unfinished one of its own stream keeps
    what comes after it, also of other streams, from starting. What runs already goes on.
    """
    queues = [deque(_given(schedule, rank, posts[rank])) for rank in range(schedule.pipeline.stages)]
    running: set[_Message] = set()
    moved = True
    while moved:
        moved = False
        for queue in queues:
            while queue:
                message, is_awaited = queue[0]
                first = _Message(message.lane, message.number - 1, message.is_sent)
                waits_for = message if is_awaited else first
                if waits_for.number >= 0 and not {waits_for, waits_for.other_end} <= running:
                    break
                running.add(message)
                queue.popleft()
                moved = True
    return not any(queues)


def _given(schedule: Schedule, rank: int, posts: Posts) -> Iterator[tuple[_Message, bool]]:
    """Yield what a rank gives its GPU, in order: ends of messages, and whether one must be done to go on."""
    pipeline = schedule.pipeline
    numbers: dict[tuple[Kind, int, int], int] = {}
    received: dict[Action, _Message] = {}
    for action, early in zip(schedule.orders[rank], posts, strict=True):
        for other in early:
            sender = source(pipeline, rank, other)
            assert sender is not None, "only what receives is posted"
            lane = (other.kind, sender[0], rank)
            received[other] = _Message(lane, numbers.setdefault(lane, 0), is_sent=False)
            numbers[lane] += 1
            yield received[other], False
        if action in received:
            yield received[action], True
        receiver = target(pipeline, rank, action)
        if receiver is not None and receiver[0] != rank:
            lane = (action.kind, rank, receiver[0])
            yield _Message(lane, numbers.setdefault(lane, 0), is_sent=True), False
            numbers[lane] += 1
