"""The order in which collectives of different buckets run on the two kinds of links.

The collectives of one bucket follow each other. Collectives of different buckets can run at the same time, one inside
groups and one between groups, because they use different links (PaRO, arXiv 2310.06003: the overlapping ring). All
ranks must start them in the same order, so the order depends only on the order of calls, never on timing.
"""

from collections import deque
from typing import NamedTuple

from megatron.longseq.sharding.plan.collectives import Collective, Collectives, Scope


class ScheduledCollective(NamedTuple):
    """One collective of a bucket in a static schedule.

    Attributes:
        slot: when it runs; a slot holds at most one collective on each kind of link.
        bucket: which bucket it works on.
        turn: its index among the bucket's collectives.
        collective: what runs.
    """

    slot: int
    bucket: int
    turn: int
    collective: Collective


def schedule(collectives: Collectives, buckets: int, *, is_overlapped: bool) -> tuple[ScheduledCollective, ...]:
    """Return when each collective of each bucket runs.

    Without overlap they run one after another. With overlap, every slot takes on each link the earliest collective that
    can run, of the first such bucket, so that no link is idle while a later bucket could use it.

    Args:
        collectives: of every bucket, in order.
        buckets: number of buckets.
        is_overlapped: whether collectives on different links share a slot.
    """
    if not is_overlapped:
        order = [(bucket, index, one) for bucket in range(buckets) for index, one in enumerate(collectives)]
        return tuple(ScheduledCollective(slot, *rest) for slot, rest in enumerate(order))
    done = [0] * buckets
    runs: list[ScheduledCollective] = []
    while min(done) < len(collectives):
        slot = runs[-1].slot + 1 if runs else 0
        chosen: dict[Scope, ScheduledCollective] = {}
        for index, bucket in sorted((index, bucket) for bucket, index in enumerate(done) if index < len(collectives)):
            one = ScheduledCollective(slot, bucket, index, collectives[index])
            chosen.setdefault(one.collective.scope, one)
        for run in chosen.values():
            done[run.bucket] += 1
        runs += chosen.values()
    return tuple(runs)


class QueuedCollective(NamedTuple):
    """A collective to put on a link's queue now.

    Attributes:
        job: number of the submission, from 0.
        turn: its index among the submission's collectives.
        link: INSIDE or BETWEEN, whose queue it goes to. A flat collective goes to BETWEEN: a flat ring is as slow as
            its hop between groups.
        collective: what runs.
    """

    job: int
    turn: int
    link: Scope
    collective: Collective


class OverlapOrder:
    """The order of collectives on the links' queues, decided as they are submitted.

    An all-reduce uses the links inside, between and inside again. Queued at once, its last collective would block the
    links inside until its second one is done. So it is delayed until `lag` more submissions have started, and the next
    submission's first collective runs in the meantime.

    Args:
        is_overlapped: use one queue for each kind of link; otherwise one queue for all.
        lag: number of submissions that start before one that returns to a link gets its turn. With a lag of the number
            of buckets the order is that of `schedule`; a larger lag only delays results.

    Raises:
        ValueError: the lag is below 1.
    """

    def __init__(self, *, is_overlapped: bool, lag: int = 1) -> None:
        if lag < 1:
            raise ValueError(f"the lag is {lag} submissions, but must be at least 1")
        self._is_overlapped, self._lag = is_overlapped, lag
        self._jobs = 0
        self._delayed: deque[list[QueuedCollective]] = deque()

    def submit(self, collectives: Collectives) -> list[QueuedCollective]:
        """Return what to queue now that one more submission is there; it gets the next number."""
        turns = [QueuedCollective(self._jobs, turn, self._link(one), one) for turn, one in enumerate(collectives)]
        back = _returns_to_a_link(turns)
        self._jobs += 1
        if turns[back:]:
            self._delayed.append(turns[back:])
        return turns[:back] + self.flush(self._jobs - 1 - self._lag)

    def flush(self, job: int) -> list[QueuedCollective]:
        """Return what to queue now so that a submission, and all before it, can finish."""
        turns: list[QueuedCollective] = []
        while self._delayed and self._delayed[0][0].job <= job:
            turns += self._delayed.popleft()
        return turns

    def _link(self, collective: Collective) -> Scope:
        return Scope.INSIDE if self._is_overlapped and collective.scope is Scope.INSIDE else Scope.BETWEEN


def _returns_to_a_link(turns: list[QueuedCollective]) -> int:
    """Return the index of the first collective on a link that the submission has left before."""
    for index in range(2, len(turns)):
        link = turns[index].link
        if link is not turns[index - 1].link and link in {turn.link for turn in turns[:index]}:
            return index
    return len(turns)
