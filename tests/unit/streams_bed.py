"""Emulate a GPU's streams: each is a queue, and work runs in any order that the events allow."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class Stream:
    """A queue of what was given to it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.work: deque[Any] = deque()

    def synchronize(self) -> None:
        """Do nothing, because `Machine.run` executes the work."""

    def wait_stream(self, other: "Stream") -> None:
        """Wait for all work that another stream was given."""
        event = Event()
        event.record(other)
        self.work.append(event)


class Event:
    """A point in a stream."""

    def __init__(self, machine: "Machine | None" = None) -> None:
        self.machine, self.is_reached = machine, False

    def record(self, stream: Stream) -> None:
        """Mark the event as reached when all earlier work of the stream is done."""
        stream.work.append(lambda: setattr(self, "is_reached", True))

    def wait(self) -> None:
        """Make the current stream wait for this event."""
        assert self.machine is not None
        self.machine.current.work.append(self)

    def query(self) -> bool:
        """Return whether the event is reached."""
        return self.is_reached


class Machine:
    """Streams, one of them the current one."""

    def __init__(self) -> None:
        self.current = Stream()
        self.streams = [self.current]

    def stream(self, device: torch.device, priority: int = 0) -> Stream:
        """Return a new stream."""
        self.streams.append(Stream(device))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Make a stream the current one."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def do(self, work: Callable[[], None]) -> None:
        """Give the current stream work."""
        self.current.work.append(work)

    def run(self, order: random.Random, steps: int | None = None) -> None:
        """Do some of the work, in an order that events allow."""
        while steps is None or steps:
            ready = [one for one in self.streams if one.work and self._can_go(one.work[0])]
            if not ready:
                assert steps is not None or not any(one.work for one in self.streams), "streams wait in a circle"
                return
            work = order.choice(ready).work.popleft()
            if not isinstance(work, Event):
                work()
            steps = steps and steps - 1

    @staticmethod
    def _can_go(work: Callable[[], None] | Event) -> bool:
        return not isinstance(work, Event) or work.is_reached


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Replace torch's streams by a simulated machine's."""
    made = Machine()
    monkeypatch.setattr(torch.cuda, "Stream", made.stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(made))
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made.current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: made.streams[0])
    return made
