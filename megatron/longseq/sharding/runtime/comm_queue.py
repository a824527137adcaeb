"""Run the collectives of buckets beside the caller, on two queues at once where collectives overlap.

`OverlapOrder` decides the order on the queues from the order of calls alone. So all ranks must submit the same work in
the same order, and must wait at the same place for work that returns to a link. Timing changes nothing.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from threading import Lock

import torch

from megatron.longseq.sharding.plan.collectives import Collective, Collectives, Scope
from megatron.longseq.sharding.plan.overlap_order import OverlapOrder, QueuedCollective
from megatron.longseq.sharding.runtime.collectives import CollectiveRunner, Region
from megatron.longseq.sharding.runtime.comm_streams import CommQueue, Completion, both, comm_queue_for

Callback = Callable[[], object]


class CommError(RuntimeError):
    """A collective failed; the message names the collective, the bucket and the rank."""


class _Submission:
    def __init__(
        self, number: int, label: str, region: Region, before: Callback | None, after: Callback | None
    ) -> None:
        self.number, self.label = number, label
        self.region: Region | None = region  # keeps the memory alive until the end: streams do not
        self.before, self.after = before, after
        self.missing = 0
        self.completion: Completion | None = None

    def release(self) -> None:
        self.region = self.before = self.after = None

    def is_done(self) -> bool:
        return not self.missing and self.completion is not None and self.completion.query()


class Work:
    """Handle of submitted collectives, as torch.distributed's `Work`.

    Args:
        wait: blocks until the collectives are done, and raises their error.
        submission: the collectives.
    """

    def __init__(self, wait: Callable[[], None], submission: _Submission) -> None:
        self._wait, self.submission = wait, submission

    def wait(self) -> None:
        """Block until the work is done; on a GPU, make the current stream wait instead. A second call does nothing.

        Collectives of this work, and of work submitted before it, that were delayed are queued now. So all ranks must
        wait at the same place for work that returns to a link. Wait in the stream that the region's memory belongs to,
        and never in `after`.

        Raises:
            CommError: a collective failed, of this work or of work before it on its queue.
        """
        self._wait()


class CommQueues:
    """Runs submitted collectives.

    Args:
        runner: runs one collective.
        device: of the tensors; decides between streams and threads.
        rank: this rank's number, for messages.
        is_overlapped: use one queue for collectives inside groups and one for the others; otherwise a single queue,
            which is right for flat and hierarchical collectives.
        lag: see `OverlapOrder`.
        make: creates a queue of a name.
    """

    def __init__(
        self,
        runner: CollectiveRunner,
        device: torch.device,
        rank: int,
        *,
        is_overlapped: bool,
        lag: int = 1,
        make: Callable[[torch.device, str], CommQueue] = comm_queue_for,
    ) -> None:
        self._runner, self._rank = runner, rank
        self._order = OverlapOrder(is_overlapped=is_overlapped, lag=lag)
        links = (Scope.INSIDE, Scope.BETWEEN) if is_overlapped else (Scope.BETWEEN,)
        self._queues = {link: make(device, f"paro-{link}") for link in links}
        self._pending: dict[int, _Submission] = {}
        self._unreleased: deque[_Submission] = deque()
        self._count = 0
        self._failure: CommError | None = None
        self._lock = Lock()
        self._is_closed = False

    def submit(
        self,
        collectives: Collectives,
        region: Region,
        label: str,
        after: Callback | None = None,
        behind: Work | None = None,
        before: Callback | None = None,
    ) -> Work:
        """Start collectives once the caller's stream has done what it was given; leave the region alone meanwhile.

        Args:
            collectives: run one after another; without those of a single rank (`nontrivial`).
            region: what they work on.
            label: of the bucket, for messages.
            after: called after the last collective on its queue (on a GPU in its stream, otherwise in its thread), for
                instance to add the result to an accumulator. It must neither submit nor wait.
            behind: other work that must be done first.
            before: called before the first collective on its queue, once `behind` is done, for instance to write what
                the collectives send. It must neither submit nor wait.

        Raises:
            ValueError: a collective cannot run on the region; nothing was started.
            CommError: the queues are closed, or a collective has failed before.
        """
        if self._is_closed:
            raise CommError(f"rank {self._rank}: {label} was submitted after the queues were closed")
        self._raise_earlier_failure(label)
        for collective in collectives:
            self._runner.check(collective, region)
        while self._unreleased and self._unreleased[0].is_done():
            self._unreleased.popleft().release()
        submission = _Submission(self._count, label, region, before, after)
        self._count += 1
        submission.missing = max(len(collectives), 1)
        submission.completion = self._queues[Scope.BETWEEN].mark()
        if behind is not None:
            self._put_all(self._order.flush(behind.submission.number))
            # Both: the region's memory may still be in use by what the caller's stream was given before.
            submission.completion = both(submission.completion, behind.submission.completion)
        self._pending[submission.number] = submission
        self._unreleased.append(submission)
        turns = self._order.submit(collectives)
        if not collectives:
            self._put(submission, Scope.BETWEEN, None)
        self._put_all(turns)
        return Work(partial(self._wait, submission), submission)

    def close(self) -> None:
        """Block until all work is done and end the queues; all ranks at the same place. Errors are raised by `wait`."""
        if self._is_closed:
            return
        self._put_all(self._order.flush(self._count))
        self._is_closed = True
        for queue in self._queues.values():
            queue.close()

    def _wait(self, submission: _Submission) -> None:
        self._put_all(self._order.flush(submission.number))
        assert submission.completion is not None, "every submission puts at least one task on a queue"
        submission.completion.wait()
        submission.release()

    def _put_all(self, turns: list[QueuedCollective]) -> None:
        for turn in turns:
            self._put(self._pending[turn.job], turn.link, turn.collective)

    def _put(self, submission: _Submission, link: Scope, collective: Collective | None) -> None:
        """Put a collective on a queue; without a collective, only the submission's callback."""
        submission.missing -= 1
        is_last, region = not submission.missing, submission.region
        before, submission.before = submission.before, None
        assert region is not None, "the submission is not done"

        def task() -> None:
            self._raise_earlier_failure(submission.label)
            try:
                with torch.no_grad():
                    if before is not None:
                        before()
                    if collective is not None:
                        self._runner.run(collective, region)
                    if is_last and submission.after is not None:
                        submission.after()
            except BaseException as error:
                raise self._failed(submission, collective, error) from error

        submission.completion = self._queues[link].put(task, submission.completion)
        if is_last:
            del self._pending[submission.number]

    def _failed(self, submission: _Submission, collective: Collective | None, error: BaseException) -> CommError:
        """Return the error for this rank's log; nothing that is queued later on this rank runs."""
        what = f"{collective.kind} {collective.scope}" if collective else "the callback"
        failure = CommError(f"rank {self._rank}: {what} of {submission.label} failed: {type(error).__name__}: {error}")
        with self._lock:
            self._failure = self._failure or failure
        return failure

    def _raise_earlier_failure(self, label: str) -> None:
        if self._failure is not None:
            raise CommError(f"{label} did not run because an earlier collective failed: {self._failure}")
