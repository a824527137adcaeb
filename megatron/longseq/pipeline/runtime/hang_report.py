"""A hang names the waiting action.

A pipeline hangs when one rank dies, stops, or runs another order than its neighbours believe. The other ranks then wait
in a receive for as long as the backend lets them, and say nothing. Here each says what it waits for, in the words of
the schedule; read together, the sentences of all ranks lead to the one rank that does not wait for anybody.

    with Watch(seconds=60) as watch:
        with watch.receive(Wait(rank, index, total, action, peer, "its gradient")):
            work.wait()

The executor's side costs one attribute write per wait and takes no lock: the watching thread only reads.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from megatron.longseq.pipeline.plan.schedule import Action

_TODO = (
    "Look at the end of the log of rank {peer}: it died, it hangs outside of the pipeline (data, checkpoint), or it "
    "waits for somebody itself; follow the ranks to the one that waits for nobody."
)


class BrokenReceive(RuntimeError):
    """A receive, here or of what was sent from here, ended with an error of the backend instead of data."""


@dataclass(frozen=True, slots=True)
class Wait:
    """What a rank waits for.

    Attributes:
        rank: the waiting rank.
        index: position of the action in the rank's order, from 0.
        total: length of that order.
        action: what cannot begin.
        peer: the rank that has to send (or to receive).
        what: what it has to send, for instance "its gradient", or else to do.
    """

    rank: int
    index: int
    total: int
    action: Action
    peer: int
    what: str

    def sentence(self, seconds: float) -> str:
        """Say it, after so many seconds."""
        where = f"action {self.index + 1} of {self.total} ({self.action})"
        return f"rank {self.rank} has waited {seconds:.0f} s in {where} for {self.what} from rank {self.peer}"

    def todo(self) -> str:
        """What to do about it."""
        return _TODO.format(peer=self.peer)


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    """A wait that began; `is_done` tells its end, None: the executor does, by `Watch.arrived`."""

    wait: Wait
    since: float
    is_done: Callable[[], bool] | None = None


def _still_open(items: tuple[_Open, ...]) -> tuple[_Open, ...]:
    return tuple(item for item in items if not _is_done(item))


def _is_done(item: _Open) -> bool:
    try:
        return item.is_done is not None and item.is_done()
    except RuntimeError:  # a failed device or backend: not done, and the sentence is wanted all the more
        return False


def broken(wait: Wait, seconds: float, error: BaseException) -> BrokenReceive:
    """Turn what the backend raised in a receive (peer died, time limit) into an error that says who waited for what.

    Args:
        wait: what was waited for.
        seconds: how long.
        error: what the backend raised; its first line is repeated.
    """
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return BrokenReceive(f"{wait.sentence(seconds)}, and got an error instead: {first}. {wait.todo()}")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Watch:
    """Tells when a receive takes too long: after `seconds`, and again each time that the wait has doubled.

    Two kinds of waits. `receive` (or `waiting` and `arrived`) is for the host that blocks: gloo. `outstanding` is for a
    receive that only the device waits for (NCCL: the host runs ahead), with a function that tells whether it is done;
    its time counts from the last moment at which any outstanding receive was seen to finish, so that a receive that was
    asked for early is not taken for a late one.

    Args:
        seconds: how long a wait may be before it is told; 0: never.
        say: where the sentences go.
        clock: seconds, any origin.
        prepare: what the thread calls first.

    Raises:
        ValueError: negative seconds.
    """

    def __init__(
        self,
        seconds: float = 60.0,
        say: Callable[[str], None] = _to_stderr,
        clock: Callable[[], float] = time.monotonic,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        if seconds < 0:
            raise ValueError(f"a watch cannot wait {seconds} s: give seconds, or 0 for none")
        self.seconds = seconds
        self._say, self._clock, self._prepare = say, clock, prepare
        # Each attribute is written by the executor's thread alone, whole, and read by the watching thread.
        self._blocked: _Open | None = None
        self._outstanding: tuple[_Open, ...] = ()
        # These belong to the watching thread.
        self._told: tuple[_Open, float] | None = None
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
        """Start the thread (a daemon: it keeps no process alive); nothing when it runs, or with 0 seconds."""
        if self._thread is None and self.seconds > 0:
            self._end.clear()
            self._thread = threading.Thread(target=self._run, name="longseq-pipeline-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the thread and forget what was waited for."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None
        self.reset()

    def reset(self) -> None:
        """Forget what was waited for: a step ended or was given up."""
        self._blocked, self._outstanding = None, ()

    def waiting(self, wait: Wait) -> None:
        """The host begins to wait; the end is `arrived`."""
        self._blocked = _Open(wait, self._clock())

    def arrived(self) -> None:
        """The host waits no longer."""
        self._blocked = None

    @contextmanager
    def receive(self, wait: Wait) -> Iterator[None]:
        """Wait inside of this context.

        Raises:
            BrokenReceive: the backend raised RuntimeError (a died peer, a time limit).
        """
        began = self._clock()
        self._blocked = _Open(wait, began)
        try:
            yield
        except RuntimeError as error:
            raise broken(wait, self._clock() - began, error) from error
        finally:
            self._blocked = None

    def outstanding(self, wait: Wait, is_done: Callable[[], bool]) -> None:
        """Watch a receive that the host does not wait for.

        Args:
            wait: what the device will wait for.
            is_done: cheap and callable from another thread, such as `query` of an event behind the receive; an event is
                better than the receive's handle, whose tensors would live until the next call.
        """
        self._outstanding = (*_still_open(self._outstanding), _Open(wait, self._clock(), is_done))

    def check(self) -> None:
        """Look once; the thread does this all the time, tests with a clock of their own."""
        now = self._clock()
        late = self._late(now)
        if late is None:
            return
        item, since = late
        waited = now - since
        again = 2 * self._told[1] if self._told is not None and self._told[0] is item else self.seconds
        if waited >= again:
            self._told = (item, waited)
            self._say(f"{item.wait.sentence(waited)}. {item.wait.todo()}")

    def _late(self, now: float) -> tuple[_Open, float] | None:
        """Return the wait to tell about, if any, and since when it counts."""
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
