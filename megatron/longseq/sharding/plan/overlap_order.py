"""In which order phases of jobs go on links: the same on all ranks, as it is decided by the order of calls alone.

Overlapped, phases inside groups take one link, and those between groups or over all ranks the other: a flat ring goes
at the pace of the link between groups, so it waits its turn there, while the inside of a group stays free for others.

A job that comes back to a link (an all-reduce: inside, between, inside) would keep it waiting meanwhile. So what it
does there again is held back until more jobs have started: the next job's first phase runs while this one is between.
"""

from collections import deque
from enum import StrEnum
from typing import NamedTuple

from megatron.longseq.sharding.plan.collectives import Phase, Phases, Scope


class Track(StrEnum):
    """What one phase at a time runs on: links of one kind, or all."""

    INSIDE = "inside"
    BETWEEN = "between"


class Turn(NamedTuple):
    """A phase to put on a link now.

    Attributes:
        job: which job, from 0.
        turn: which of its phases.
        track: where.
        phase: the collective.
    """

    job: int
    turn: int
    track: Track
    phase: Phase


class Order:
    """The order on links.

    Args:
        is_overlapped: two links; else everything goes over one.
        lag: a job comes back to a link when so many more have started. At `ring.schedule`'s order: as many as a
            collective has buckets. More of them keep results back longer.

    Raises:
        ValueError: a lag below 1.
    """

    def __init__(self, *, is_overlapped: bool, lag: int = 1) -> None:
        if lag < 1:
            raise ValueError(f"a job that comes back to a link after {lag} more: give at least 1")
        self._is_overlapped, self._lag = is_overlapped, lag
        self._jobs = 0
        self._held: deque[list[Turn]] = deque()

    def submit(self, phases: Phases) -> list[Turn]:
        """Return what to put on links now that a job is there, which gets the next number."""
        turns = [Turn(self._jobs, turn, self._track(phase), phase) for turn, phase in enumerate(phases)]
        back = _comes_back(turns)
        self._jobs += 1
        if turns[back:]:
            self._held.append(turns[back:])
        return turns[:back] + self.flush(self._jobs - 1 - self._lag)

    def flush(self, job: int) -> list[Turn]:
        """Return what to put on links now that a job, and so those before it, must end."""
        turns: list[Turn] = []
        while self._held and self._held[0][0].job <= job:
            turns += self._held.popleft()
        return turns

    def _track(self, phase: Phase) -> Track:
        return Track.INSIDE if self._is_overlapped and phase.scope is Scope.INSIDE else Track.BETWEEN


def _comes_back(turns: list[Turn]) -> int:
    """Return which of a job's phases is the first on a link that the job has left."""
    for index in range(2, len(turns)):
        track = turns[index].track
        if track is not turns[index - 1].track and track in {turn.track for turn in turns[:index]}:
            return index
    return len(turns)
