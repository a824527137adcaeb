"""How many bytes of tensors a piece of work has allocated at a time, as PyTorch's CPU allocator counts them."""

from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocated:
    """Bytes of tensors that were allocated since a piece of work began.

    Attributes:
        peak: the most at a time.
        left: at the end.
    """

    peak: int
    left: int


class AllocationCounter:
    """Counts what this thread allocates from `start` to `stop`; memory from before that is freed does not count."""

    def start(self) -> None:
        """Begin to count."""
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self) -> Allocated:
        """Stop counting."""
        self._profile.stop()
        found = self._profile.profiler.kineto_results.events()
        changes = [(event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]"]
        now = peak = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            now += change
            peak = max(peak, now)
        return Allocated(peak, now)
