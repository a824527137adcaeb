"""Jobs, each some phases on a bucket, run on lanes beside the caller: on both at once where collectives overlap.

Phases go on lanes in the order of `order`, so all ranks have to submit the same jobs in the same order, and to wait in
the same place for a job that comes back to a lane. How soon tensors are ready, and how fast ranks are, changes nothing.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Protocol

import torch

from megatron.longseq.sharding.plan.collectives import Phase, Phases
from megatron.longseq.sharding.plan.overlap_order import Order, Track, Turn
from megatron.longseq.sharding.runtime.collectives import Region
from megatron.longseq.sharding.runtime.comm_streams import Done, Lane, lane_for

After = Callable[[], object]


class LaneError(RuntimeError):
    """A phase failed; it says which, and on which rank."""


class Runner(Protocol):
    """What runs phases: `Collectives`."""

    def check(self, phase: Phase, region: Region) -> None:
        """Raise ValueError if a phase cannot run on a region."""
        ...

    def run(self, phase: Phase, region: Region) -> None:
        """Run a phase in place."""
        ...


class _Job:
    def __init__(self, number: int, label: str, region: Region, after: After | None) -> None:
        self.number, self.label = number, label
        self.region: Region | None = region  # kept alive until the end: streams do not hold what they work on
        self.after = after
        self.missing = 0
        self.done: Done | None = None

    def release(self) -> None:
        self.region = self.after = None

    def is_done(self) -> bool:
        return not self.missing and self.done is not None and self.done.is_done()


class Handle:
    """A job on its way."""

    def __init__(self, wait: Callable[[], None], job: _Job) -> None:
        self._wait, self.job = wait, job

    def wait(self) -> None:
        """Return when the job is done; on a GPU, have the current stream go on when it is. Again: no more to do.

        What this job and those before it held back goes on lanes now: where some come back to a lane, all ranks wait
        in the same place among their submissions. Wait in the stream that the region's memory belongs to, never in
        `after`.

        Raises:
            LaneError: a phase failed, of this job or of one before it on a lane.
        """
        self._wait()


class Lanes:
    """Runs jobs.

    Args:
        runner: what runs a phase.
        device: of the tensors; it decides which kind of lane there is.
        rank: this rank's number, for messages.
        is_overlapped: one lane for phases inside groups, one for the others; else one for all, which is right for
            `ring.Mode` flat and hierarchical.
        lag: see `order.Order`.
        make: makes a lane of a name.
    """

    def __init__(
        self,
        runner: Runner,
        device: torch.device,
        rank: int,
        *,
        is_overlapped: bool,
        lag: int = 1,
        make: Callable[[torch.device, str], Lane] = lane_for,
    ) -> None:
        self._runner, self._rank = runner, rank
        self._order = Order(is_overlapped=is_overlapped, lag=lag)
        tracks = tuple(Track) if is_overlapped else (Track.BETWEEN,)
        self._lanes = {track: make(device, f"paro-{track}") for track in tracks}
        self._jobs: dict[int, _Job] = {}
        self._oldest: deque[_Job] = deque()
        self._count = 0
        self._failure: LaneError | None = None
        self._lock = Lock()
        self._is_closed = False

    def submit(
        self, phases: Phases, region: Region, label: str, after: After | None = None, behind: Handle | None = None
    ) -> Handle:
        """Start a job when what the caller's stream has been given so far is done. Nobody touches the region meanwhile.

        Args:
            phases: one after another; none of a single rank (`phases.needed`).
            region: what they work on.
            label: which bucket it is, for messages.
            after: called on the last phase's lane after it, for instance to add the result to an accumulator: on a GPU
                in the lane's stream, else in its thread. It neither submits nor waits.
            behind: another job, which has to be done first.

        Raises:
            ValueError: a phase cannot run on the region; nothing was started.
            LaneError: lanes are closed, or a phase has failed before.
        """
        if self._is_closed:
            raise LaneError(f"rank {self._rank}: {label} comes after lanes were closed")
        self._fail_early(label)
        for phase in phases:
            self._runner.check(phase, region)
        while self._oldest and self._oldest[0].is_done():
            self._oldest.popleft().release()
        job = _Job(self._count, label, region, after)
        self._count += 1
        job.missing = max(len(phases), 1)
        job.done = self._lanes[Track.BETWEEN].mark()
        if behind is not None:
            self._put_all(self._order.flush(behind.job.number))
            job.done = behind.job.done
        self._jobs[job.number] = job
        self._oldest.append(job)
        turns = self._order.submit(phases)
        if not phases:
            self._put(job, Track.BETWEEN, None)
        self._put_all(turns)
        return Handle(partial(self._wait, job), job)

    def close(self) -> None:
        """End lanes when all jobs have ended; all ranks at the same place. Errors are those that `wait` raises."""
        if self._is_closed:
            return
        self._put_all(self._order.flush(self._count))
        self._is_closed = True
        for lane in self._lanes.values():
            lane.close()

    def _wait(self, job: _Job) -> None:
        self._put_all(self._order.flush(job.number))
        assert job.done is not None, "something of every job goes on a lane"
        job.done.wait()
        job.release()

    def _put_all(self, turns: list[Turn]) -> None:
        for turn in turns:
            self._put(self._jobs[turn.job], turn.track, turn.phase)

    def _put(self, job: _Job, track: Track, phase: Phase | None) -> None:
        """Put a phase, or of a job without any what comes after, on a lane."""
        job.missing -= 1
        is_last, region = not job.missing, job.region
        assert region is not None, "a job that is not done"

        def work() -> None:
            self._fail_early(job.label)
            try:
                with torch.no_grad():
                    if phase is not None:
                        self._runner.run(phase, region)
                    if is_last and job.after is not None:
                        job.after()
            except BaseException as error:
                raise self._failed(job, phase, error) from error

        job.done = self._lanes[track].put(work, job.done)
        if is_last:
            del self._jobs[job.number]

    def _failed(self, job: _Job, phase: Phase | None, error: BaseException) -> LaneError:
        """Return an error for every rank's log; what comes later on this rank's lanes is not run."""
        what = f"{phase.kind} {phase.scope}" if phase else "what comes after no phase"
        failure = LaneError(f"rank {self._rank}: {what} of {job.label} failed: {type(error).__name__}: {error}")
        with self._lock:
            self._failure = self._failure or failure
        return failure

    def _fail_early(self, label: str) -> None:
        if self._failure is not None:
            raise LaneError(f"{label} did not run, as an earlier phase failed: {self._failure}")
