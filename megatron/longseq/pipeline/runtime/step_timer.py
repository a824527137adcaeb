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
from typing import Any

import torch

from megatron.longseq.pipeline.plan.schedule import Action, Pipeline
from megatron.longseq.pipeline.plan.simulate import ActionTime


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

    def restart(self) -> None:
        """Start a step: record the reference event."""
        self._reference = self.stamp()

    def stamp(self) -> Any:
        """Record an event."""
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
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

    def __init__(self, clock: HostClock | DeviceClock) -> None:
        self._clock = clock
        self._stamps: list[tuple[Action, Any, Any]] | None = None

    def start_step(self) -> None:
        """Start a step, and discard an unfinished one."""
        self._stamps = []
        self._clock.restart()

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        """Measure an action as a context; an action that raises is not recorded.

        Enter it after the action's input has arrived, and leave it before its output is sent: waiting is not part of
        the action's time.

        Raises:
            RuntimeError: no step was started.
        """
        stamps = self._started()
        start = self._clock.stamp()
        yield
        stamps.append((action, start, self._clock.stamp()))

    def finish(self) -> tuple[ActionTime, ...]:
        """End the step.

        Returns:
            The actions in the order in which they ran, with start and end in seconds of Unix time.

        Raises:
            RuntimeError: no step was started.
        """
        stamps, self._stamps = self._started(), None
        times = iter(self._clock.read([moment for _, *both in stamps for moment in both]))
        return tuple(ActionTime(action, next(times), next(times)) for action, _, _ in stamps)

    def _started(self) -> list[tuple[Action, Any, Any]]:
        if self._stamps is None:
            raise RuntimeError("no step was started: call start_step first")
        return self._stamps


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
