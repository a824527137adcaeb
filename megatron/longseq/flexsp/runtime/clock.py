"""Times of micro-batches on this rank, on the host or on the device."""

import time
from dataclasses import dataclass, field

import torch


def _now() -> float | torch.cuda.Event:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@dataclass
class StepClock:
    """Marks of one step.

    Attributes:
        marks: beginnings of the forward passes of this rank's first chunk, in order.
        ends: the end of the passes, before gradients are reduced, and the end of the step.
    """

    marks: list[float | torch.cuda.Event] = field(default_factory=list)
    ends: list[float | torch.cuda.Event] = field(default_factory=list)

    def begin(self) -> None:
        """Mark the beginning of a micro-batch's forward pass."""
        self.marks.append(_now())

    def end(self) -> None:
        """Mark the end of the passes, and then that of the step."""
        self.ends.append(_now())

    def microbatch_seconds(self) -> list[float]:
        """Return the time from each micro-batch's beginning to that of the next one. Waits for the device."""
        return [_seconds(a, b) for a, b in zip(self.marks, [*self.marks[1:], self.ends[0]], strict=True)]

    def pass_seconds(self) -> float:
        """Return the time of all passes, without the reduction of gradients. Waits for the device."""
        return _seconds(self.marks[0], self.ends[0])

    def step_seconds(self) -> float:
        """Return the time of the step's passes and the reduction of gradients. Waits for the device."""
        return _seconds(self.marks[0], self.ends[-1])
