"""When each action of this rank began and ended, measured.

    recorder = Recorder(DeviceClock() if torch.cuda.is_available() else HostClock())
    recorder.start_step()
    with recorder.action(action):
        ...
    spans = recorder.finish()

One common clock makes the ranks comparable: Unix time, read once per step and rank. Inside of a step only differences
count, of the host's monotonic clock or of events on the device, so no correction of the wall clock can bend a span.
Between the processes of one machine the ranks then agree to some microseconds; between machines as well as their wall
clocks do (NTP: about a millisecond), which is enough to look at and no basis for measuring a message's latency.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from megatron.longseq.pipeline.plan.schedule import Action
from megatron.longseq.pipeline.plan.timeline import Span


class Clock(Protocol):
    """Stamps moments now and tells their Unix time later."""

    def restart(self) -> None:
        """Begin a step: earlier stamps are void."""

    def stamp(self) -> Any:
        """Note this moment."""

    def read(self, stamps: Sequence[Any]) -> list[float]:
        """Unix time of each stamp of this step, in seconds."""


class HostClock:
    """Moments of the host: right where the host computes, or waits for what computes."""

    def restart(self) -> None:
        """Tie the monotonic clock to Unix time."""
        self._offset = time.time() - time.perf_counter()

    def stamp(self) -> float:
        """Note this moment."""
        return time.perf_counter()

    def read(self, stamps: Sequence[float]) -> list[float]:
        """Unix time of each stamp, in seconds."""
        return [stamp + self._offset for stamp in stamps]


class DeviceClock:
    """Moments of the current CUDA stream; the host waits for it once, in `read`.

    The stream may be far behind the host when a step begins, so its events are tied to Unix time at the end, where the
    host has waited for it: the last event happened just now, the others so and so long before.
    """

    def __init__(self) -> None:
        self._pool: list[Any] = []  # events, used again in every step
        self._used = 0

    def restart(self) -> None:
        """Take the events back, and record the one that the others are measured from."""
        self._used = 0
        self._reference = self.stamp()

    def stamp(self) -> Any:
        """Record an event."""
        if self._used == len(self._pool):
            new: Any = torch.cuda.Event
            self._pool.append(new(enable_timing=True))
        event = self._pool[self._used]
        self._used += 1
        event.record()
        return event

    def read(self, stamps: Sequence[Any]) -> list[float]:
        """Unix time of each stamp, in seconds; waits until the stream has passed them."""
        last = self.stamp()
        last.synchronize()
        origin = time.time() - self._reference.elapsed_time(last) * 1e-3
        return [origin + self._reference.elapsed_time(stamp) * 1e-3 for stamp in stamps]


class Recorder:
    """Records one step at a time.

    Args:
        clock: `HostClock` or `DeviceClock`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: tuple[Action, Any] | None = None
        self._actions: list[Action] | None = None
        self._stamps: list[Any] = []

    def start_step(self) -> None:
        """Begin a step; one that was not finished is forgotten."""
        self._open, self._actions, self._stamps = None, [], []
        self._clock.restart()

    def begin(self, action: Action) -> None:
        """Begin an action: after its input has come, so that waiting is no part of the span.

        Raises:
            RuntimeError: no step was started, or another action has not ended.
        """
        if self._actions is None or self._open is not None:
            why = "no step was started" if self._open is None else f"the {self._open[0]} has not ended"
            raise RuntimeError(f"cannot record the {action}: {why}; call start_step, begin, end in this order")
        self._open = (action, self._clock.stamp())

    def end(self) -> None:
        """End the action: before its output is sent.

        Raises:
            RuntimeError: none has begun.
        """
        if self._open is None or self._actions is None:
            raise RuntimeError("no action to end: call begin first")
        action, start = self._open
        self._actions.append(action)
        self._stamps += (start, self._clock.stamp())
        self._open = None

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        """Begin and end an action; one that raises is not recorded."""
        self.begin(action)
        try:
            yield
        except BaseException:
            self._open = None
            raise
        self.end()

    def finish(self) -> tuple[Span, ...]:
        """End the step.

        Returns:
            The actions in the order in which they ran; start and end in seconds of Unix time, see `aligned`.

        Raises:
            RuntimeError: no step was started, or an action has not ended.
        """
        if self._actions is None or self._open is not None:
            why = "no step was started" if self._open is None else f"the {self._open[0]} has not ended"
            raise RuntimeError(f"cannot finish a step: {why}")
        times = iter(self._clock.read(self._stamps))
        spans = tuple(Span(action, next(times), next(times)) for action in self._actions)
        self._actions = None
        return spans


def aligned(ranks: Sequence[Sequence[Span]]) -> tuple[tuple[Span, ...], ...]:
    """Count the times of all ranks from the first start of any: what `Timeline` wants."""
    zero = min((span.start for spans in ranks for span in spans), default=0.0)
    return tuple(tuple(Span(span.action, span.start - zero, span.end - zero) for span in spans) for spans in ranks)
