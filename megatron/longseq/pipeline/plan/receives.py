"""Plan when each rank posts its receives: early enough to overlap, but only for messages that are being produced.

On a GPU a posted receive occupies the device until its message arrives. If the message depended on an action that this
rank has not issued yet, anything that waits for the whole device (a timer, the first load of a kernel, an autotuner)
would wait for that receive and deadlock.

This holds while one rank at a time waits for its whole device. Neighbours that both do wait for each other's next
message, if both have posted its receive. `plan_synchronized_receives` returns an order for steps in which every rank
may wait in every action.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Schedule, source, target

AHEAD = 2  # receives in flight per direction: one for the next action, one for the action after it

# For each action of one rank, in order: the actions whose receives are posted before it.
ReceiveOrder = tuple[tuple[Action, ...], ...]


def plan_receives(schedule: Schedule, ahead: int = AHEAD) -> tuple[ReceiveOrder, ...]:
    """Return the receive order of every rank.

    Args:
        schedule: a validated schedule.
        ahead: receives of one direction that may be in flight at once, from 1.
    """
    dependencies = _needed(schedule)
    return tuple(_receives(schedule, rank, dependencies, ahead) for rank in range(schedule.pipeline.stages))


def _receives(
    schedule: Schedule, rank: int, dependencies: dict[tuple[int, Action], list[int]], ahead: int
) -> ReceiveOrder:
    order = schedule.orders[rank]
    due: dict[tuple[ActionKind, int], list[Action]] = {}
    for action in order:
        sender = source(schedule.pipeline, rank, action)
        if sender is not None and sender[0] != rank:
            due.setdefault((action.kind, sender[0]), []).append(action)
    posted, received = dict.fromkeys(due, 0), dict.fromkeys(due, 0)
    receives: list[tuple[Action, ...]] = []
    for index, action in enumerate(order):
        now: list[Action] = []
        for channel, messages in due.items():
            while posted[channel] < min(len(messages), received[channel] + ahead):
                sender = source(schedule.pipeline, rank, messages[posted[channel]])
                if sender is None or dependencies[sender][rank] >= index:
                    break
                now.append(messages[posted[channel]])
                posted[channel] += 1
        receives.append(tuple(now))
        sender = source(schedule.pipeline, rank, action)
        if sender is not None and sender[0] != rank:
            received[action.kind, sender[0]] += 1
    return tuple(receives)


def _needed(schedule: Schedule) -> dict[tuple[int, Action], list[int]]:
    """Return the dependencies of each action of each rank: per rank the index of the last action, or -1."""
    pipeline = schedule.pipeline
    dependencies: dict[tuple[int, Action], list[int]] = {}
    at = [0] * pipeline.stages
    before = [[-1] * pipeline.stages for _ in range(pipeline.stages)]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            while at[rank] < len(order):
                sender = source(pipeline, rank, order[at[rank]])
                if sender is not None and sender not in dependencies:
                    break
                last = before[rank] if sender is None else list(map(max, before[rank], dependencies[sender]))
                before[rank] = [*last[:rank], at[rank], *last[rank + 1 :]]
                dependencies[rank, order[at[rank]]] = before[rank]
                at[rank] += 1
                moved = True
    return dependencies


def plan_synchronized_receives(schedule: Schedule) -> tuple[ReceiveOrder, ...]:
    """Return a receive order of every rank with which a step ends even if all ranks wait for their devices.

    Wherever the ranks wait for all messages that they have posted, an action ends when its receives have arrived and
    the sends before it are received. This function runs the schedule under this rule. A receive is posted right before
    its own action. If a sender waits for it while nothing else can run, it is posted at once: then its message has been
    sent already, so that it makes nobody wait. Every wait is for an earlier action of this run, so no timing deadlocks.
    That also holds where less waits: if messages share a stream, and on one queue.

    Args:
        schedule: a validated schedule.
    """
    ranks = [_SynchronizedRank(schedule, rank) for rank in range(schedule.pipeline.stages)]
    while any(not rank.has_ended for rank in ranks):
        if any([rank.run(ranks) for rank in ranks]):
            continue
        if not any([rank.post_sent() for rank in ranks]):
            raise ValueError(f"{schedule.name}: the ranks wait for each other's messages in a circle")
    return tuple(tuple(map(tuple, rank.receives)) for rank in ranks)


class _SynchronizedRank:
    """A rank of `plan_synchronized_receives`.

    Attributes:
        receives: receives that are posted before each action.
        sent: messages that other ranks have sent to this one, by the action that needs them.
        posted: messages whose receive this rank has posted.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._schedule, self._rank, self._order = schedule, rank, schedule.orders[rank]
        self._at, self._sends = 0, list[tuple[int, Action]]()
        self._due: dict[tuple[ActionKind, int], deque[Action]] = {}
        for action in self._order:
            sender = source(schedule.pipeline, rank, action)
            if sender is not None and sender[0] != rank:
                self._due.setdefault((action.kind, sender[0]), deque()).append(action)
        self.receives: list[list[Action]] = [[] for _ in self._order]
        self.sent: set[Action] = set()
        self.posted: set[Action] = set()

    @property
    def has_ended(self) -> bool:
        """Whether all actions have ended."""
        return self._at == len(self._order)

    def run(self, ranks: Sequence["_SynchronizedRank"]) -> bool:
        """Run actions until one has to wait; return whether anything was done."""
        was_done = False
        while not self.has_ended:
            action = self._order[self._at]
            was_done |= self._post(lambda one, own=action: one == own)  # type: ignore[misc]
            if not self.posted <= self.sent or any(one not in ranks[peer].posted for peer, one in self._sends):
                break
            receiver = target(self._schedule.pipeline, self._rank, action)
            if receiver is not None and receiver[0] != self._rank:
                ranks[receiver[0]].sent.add(receiver[1])
                self._sends.append(receiver)
            self._at += 1
            was_done = True
        return was_done

    def post_sent(self) -> bool:
        """Post the receives of all messages that have been sent; return whether there was one."""
        return not self.has_ended and self._post(lambda one: one in self.sent)

    def _post(self, is_posted: Callable[[Action], bool]) -> bool:
        """Post the first receives of every channel that fulfil a condition, before the next action."""
        now: list[Action] = []
        for messages in self._due.values():
            while messages and is_posted(messages[0]):
                now.append(messages.popleft())
        self.receives[self._at] += now
        self.posted.update(now)
        return bool(now)


@dataclass(frozen=True)
class _Message:
    """One end of a message, which completes when both ends run."""

    channel: tuple[ActionKind, int, int]  # direction, sender, receiver: one stream at each end
    number: int
    is_sent: bool

    @property
    def other_end(self) -> "_Message":
        return _Message(self.channel, self.number, not self.is_sent)


def is_deadlock_free_on_one_queue(schedule: Schedule, orders: Sequence[ReceiveOrder]) -> bool:
    """Return whether a step completes if all streams of a GPU share one queue (CUDA_DEVICE_MAX_CONNECTIONS=1).

    The GPU then starts work in the order in which it was issued. A message that has to wait for an earlier message of
    its own stream also delays everything issued after it, on any stream. Work that has started continues.

    Args:
        schedule: a validated schedule.
        orders: the receive order of every rank.
    """
    queues = [deque(_issued(schedule, rank, orders[rank])) for rank in range(schedule.pipeline.stages)]
    running: set[_Message] = set()
    moved = True
    while moved:
        moved = False
        for queue in queues:
            while queue:
                message, is_awaited = queue[0]
                previous = _Message(message.channel, message.number - 1, message.is_sent)
                blocker = message if is_awaited else previous
                if blocker.number >= 0 and not {blocker, blocker.other_end} <= running:
                    break
                running.add(message)
                queue.popleft()
                moved = True
    return not any(queues)


def _issued(schedule: Schedule, rank: int, receives: ReceiveOrder) -> Iterator[tuple[_Message, bool]]:
    """Yield the message ends that a rank issues, in order, and whether the rank waits there for the message."""
    pipeline = schedule.pipeline
    numbers: dict[tuple[ActionKind, int, int], int] = {}
    received: dict[Action, _Message] = {}
    for action, early in zip(schedule.orders[rank], receives, strict=True):
        for other in early:
            sender = source(pipeline, rank, other)
            assert sender is not None, "only receiving actions are listed"
            channel = (other.kind, sender[0], rank)
            received[other] = _Message(channel, numbers.setdefault(channel, 0), is_sent=False)
            numbers[channel] += 1
            yield received[other], False
        if action in received:
            yield received[action], True
        receiver = target(pipeline, rank, action)
        if receiver is not None and receiver[0] != rank:
            channel = (action.kind, rank, receiver[0])
            yield _Message(channel, numbers.setdefault(channel, 0), is_sent=True), False
            numbers[channel] += 1
