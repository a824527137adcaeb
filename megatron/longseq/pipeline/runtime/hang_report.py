"""Report which action a rank waits in when the pipeline hangs.

A pipeline hangs if one rank dies, stops, or runs another order than its neighbours. The other ranks then wait in a
receive, silently, until the backend times out. With a `HangReporter` each rank reports what it waits for. Read
together, the reports of all ranks lead to the one rank that does not wait.

    with HangReporter(seconds=60) as reporter:
        with reporter.blocking(Wait(rank, index, total, action, peer, "its gradient")):
            work.wait()

A wait costs the executor one attribute write and no lock, since the reporting thread only reads.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from megatron.longseq.pipeline.plan.schedule import Action


class BrokenMessage(RuntimeError):
    """A receive or a send ended with an error of the backend."""


@dataclass(frozen=True, slots=True)
class Wait:
    """What a rank waits for.

    Attributes:
        rank: the waiting rank.
        index: position of the action in the rank's order, from 0.
        total: number of actions in that order.
        action: the action that cannot start (or whose output cannot be sent).
        peer: the rank that has to send (or to receive).
        what: what is expected from it, for instance "its gradient".
    """

    rank: int
    index: int
    total: int
    action: Action
    peer: int
    what: str

    def report(self, seconds: float, error: str = "") -> str:
        """Return the report after a wait of `seconds`, perhaps with an error of the backend, and what to do.

        Args:
            seconds: how long the rank has waited.
            error: message of the backend; empty: there is none.
        """
        where = f"action {self.index + 1} of {self.total} ({self.action})"
        cause = f", and got an error instead: {error}" if error else ""
        return (
            f"rank {self.rank} has waited {seconds:.0f} s in {where} for {self.what} from rank {self.peer}{cause}. "
            f"Look at the end of the log of rank {self.peer}: it died, it hangs outside of the pipeline (data, "
            "checkpoint), or it waits for somebody itself; follow the ranks to the one that waits for nobody."
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    """A wait in progress; `is_done` tells whether it has ended."""

    wait: Wait
    since: float
    is_done: Callable[[], bool] = lambda: False  # the host blocks in it


def _still_open(items: tuple[_Open, ...]) -> tuple[_Open, ...]:
    return tuple(item for item in items if not _is_done(item))


def _is_done(item: _Open) -> bool:
    try:
        return item.is_done()
    except RuntimeError:  # a failed device or backend: not done, and the report is needed
        return False


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class HangReporter:
    """Reports a wait after `seconds`, and again each time that it has doubled.

    `blocking` is for waits of the host (gloo). `outstanding` is for receives that only the device waits for (NCCL,
    where the host runs ahead). Their time counts from the last moment at which any outstanding receive completed, so
    that a receive that was posted early is not reported as late.

    Args:
        seconds: length of a wait before it is reported; 0: never.
        say: receives each report.
        clock: returns seconds from any origin.
        prepare: called first in the reporting thread.

    Raises:
        ValueError: `seconds` is negative.
    """

    def __init__(
        self,
        seconds: float = 60.0,
        say: Callable[[str], None] = _to_stderr,
        clock: Callable[[], float] = time.monotonic,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        if seconds < 0:
            raise ValueError(f"the hang report cannot wait {seconds} s; give 0 for no report, or more")
        self.seconds = seconds
        self._say, self._clock, self._prepare = say, clock, prepare
        # Only the executor's thread writes these, each in one assignment; the reporting thread reads them.
        self._blocked: _Open | None = None
        self._outstanding: tuple[_Open, ...] = ()
        # Only the reporting thread uses these.
        self._reported: tuple[_Open, float] | None = None
        self._progress = clock()
        self._seen_open: tuple[_Open, ...] = ()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the reporting thread, a daemon, unless it runs already or `seconds` is 0."""
        if self._thread is None and self.seconds > 0:
            self._end.clear()
            self._thread = threading.Thread(target=self._run, name="longseq-pipeline-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the thread and forget all waits."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None
        self._blocked, self._outstanding = None, ()

    @contextmanager
    def blocking(self, wait: Wait) -> Iterator[None]:
        """Mark the body of this context as a wait of the host.

        Raises:
            BrokenMessage: the backend raised a RuntimeError (a dead peer, a timeout), whose first line is repeated.
        """
        began = self._clock()
        self._blocked = _Open(wait, began)
        try:
            yield
        except RuntimeError as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BrokenMessage(wait.report(self._clock() - began, cause)) from error
        finally:
            self._blocked = None

    def outstanding(self, wait: Wait, is_done: Callable[[], bool]) -> None:
        """Observe a receive that the host does not wait for.

        Args:
            wait: the wait of the device.
            is_done: returns whether the receive is complete; cheap, and callable from another thread. Use `query` of an
                event behind the receive: the receive's handle would keep its tensors alive until the next call.
        """
        self._outstanding = (*_still_open(self._outstanding), _Open(wait, self._clock(), is_done))

    def current(self) -> Wait | None:
        """Return what this rank waits for now, the oldest such wait, or None. Any thread may call this."""
        blocked = self._blocked
        if blocked is not None:
            return blocked.wait
        return next((item.wait for item in _still_open(self._outstanding)), None)

    def check(self) -> None:
        """Report a wait that is due. The thread calls this repeatedly."""
        now = self._clock()
        late = self._late(now)
        if late is None:
            return
        item, start = late
        waited = now - start
        again = 2 * self._reported[1] if self._reported is not None and self._reported[0] is item else self.seconds
        if waited >= again:
            self._reported = (item, waited)
            self._say(item.wait.report(waited))

    def _late(self, now: float) -> tuple[_Open, float] | None:
        """Return the wait that could be reported, if any, and when its time starts to count."""
        blocked = self._blocked
        if blocked is not None:
            return blocked, blocked.since
        still = _still_open(self._outstanding)
        if any(item not in still for item in self._seen_open):
            self._progress = now
        self._seen_open = still
        return (still[0], max(still[0].since, self._progress)) if still else None

    def _run(self) -> None:
        self._prepare()
        while not self._end.wait(min(self.seconds / 8, 5.0)):
            self.check()
