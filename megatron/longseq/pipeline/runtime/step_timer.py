"""Measure when each action of this rank starts and ends, and write the result to a file per rank.

    timer = StepTimer(DeviceClock() if torch.cuda.is_available() else HostClock())
    timer.start_step()
    with timer.action(action):
        ...
    spans = timer.finish()

Times are Unix times, so that ranks can be compared. Unix time is read once per step and rank; within a step only
differences of the host's monotonic clock, or of events on the device, count. Ranks on one machine agree to some
microseconds. Between machines the error is that of their wall clocks (about a millisecond with NTP): enough for a
picture, too much to measure the latency of a message.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron.longseq.pipeline.plan.schedule import Action, Pipeline
from megatron.longseq.pipeline.plan.simulate import ActionTime


class Clock(Protocol):
    """Records moments, and converts them to Unix time later."""

    def restart(self) -> None:
        """Start a step; earlier stamps become invalid."""

    def stamp(self) -> Any:
        """Record the current moment."""

    def read(self, stamps: Sequence[Any]) -> list[float]:
        """Return the Unix time of each stamp of this step, in seconds."""


class HostClock:
    """Clock of the host, for computation that the host itself runs or waits for."""

    def restart(self) -> None:
        """Start a step."""
        self._offset = time.time() - time.perf_counter()

    def stamp(self) -> float:
        """Record the current moment."""
        return time.perf_counter()

    def read(self, stamps: Sequence[float]) -> list[float]:
        """Return the Unix time of each stamp, in seconds."""
        return [stamp + self._offset for stamp in stamps]


class DeviceClock:
    """Clock of the current CUDA stream. The host waits for the stream once, in `read`.

    At the start of a step the stream may be far behind the host. So the events are related to Unix time at the end,
    when the host has waited for the last event.
    """

    def __init__(self) -> None:
        self._pool: list[Any] = []  # events, reused in every step
        self._used = 0

    def restart(self) -> None:
        """Start a step: reuse the events, and record the reference event."""
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
        """Return the Unix time of each stamp, in seconds, after waiting for the stream to pass them."""
        last = self.stamp()
        last.synchronize()
        origin = time.time() - self._reference.elapsed_time(last) * 1e-3
        return [origin + self._reference.elapsed_time(stamp) * 1e-3 for stamp in stamps]


class StepTimer:
    """Measures the actions of one step at a time.

    Args:
        clock: `HostClock` or `DeviceClock`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: tuple[Action, Any] | None = None
        self._actions: list[Action] | None = None
        self._stamps: list[Any] = []

    def start_step(self) -> None:
        """Start a step, and discard an unfinished one."""
        self._open, self._actions, self._stamps = None, [], []
        self._clock.restart()

    def begin(self, action: Action) -> None:
        """Start an action. Call this after its input has arrived, so that waiting is not part of the action's time.

        Raises:
            RuntimeError: no step was started, or another action has not ended.
        """
        if self._actions is None or self._open is not None:
            why = "no step was started" if self._open is None else f"the {self._open[0]} has not ended"
            raise RuntimeError(f"cannot record the {action}: {why}; call start_step, begin, end in this order")
        self._open = (action, self._clock.stamp())

    def end(self) -> None:
        """End the action. Call this before its output is sent.

        Raises:
            RuntimeError: no action has begun.
        """
        if self._open is None or self._actions is None:
            raise RuntimeError("no action to end: call begin first")
        action, start = self._open
        self._actions.append(action)
        self._stamps += (start, self._clock.stamp())
        self._open = None

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        """Measure an action as a context; an action that raises is not recorded."""
        self.begin(action)
        try:
            yield
        except BaseException:
            self._open = None
            raise
        self.end()

    def finish(self) -> tuple[ActionTime, ...]:
        """End the step.

        Returns:
            The actions in the order in which they ran, with start and end in seconds of Unix time.

        Raises:
            RuntimeError: no step was started, or an action has not ended.
        """
        if self._actions is None or self._open is not None:
            why = "no step was started" if self._open is None else f"the {self._open[0]} has not ended"
            raise RuntimeError(f"cannot finish a step: {why}")
        times = iter(self._clock.read(self._stamps))
        spans = tuple(ActionTime(action, next(times), next(times)) for action in self._actions)
        self._actions = None
        return spans


def write_measured(folder: Path, rank: int, pipeline: Pipeline, name: str, spans: Sequence[ActionTime]) -> Path:
    """Write one rank's measured step to `rank-NNNN.json`, which appears only when it is complete.

    `tools.chrome_trace.read_measured` joins the files of all ranks.

    Args:
        folder: folder for one step of one run; created if missing.
        rank: pipeline rank, from 0.
        pipeline: sizes of the pipeline.
        name: name of the schedule, the same on all ranks.
        spans: actions in the order in which they ran, in seconds on a clock that all ranks share.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [[s.action.kind, s.action.microbatch, s.action.segment, s.action.vstage, s.start, s.end] for s in spans]
    file = folder / f"rank-{rank:04d}.json"
    half = file.with_suffix(f".{os.getpid()}.half")
    half.write_text(json.dumps({"name": name, "pipeline": asdict(pipeline), "rank": rank, "spans": rows}) + "\n")
    half.replace(file)
    return file
