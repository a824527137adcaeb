"""Two kinds of lane, which run work one after another beside the caller: a stream of a GPU, a thread where none is.

A lane starts in the order of `put`, each work after another one where that is given, also on another lane. Streams are
given everything at once; a thread does it itself, as gloo's collectives end before they return.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread, current_thread
from typing import Any, Protocol

import torch

Work = Callable[[], None]
EXIT_SECONDS = 1.0  # what a process that ends gives a thread that is still at work


class Done(Protocol):
    """The end of work."""

    def wait(self) -> None:
        """Return when (on a GPU: have the current stream go on when) it is done; raise what it raised."""
        ...

    def is_done(self) -> bool:
        """Whether it is done, in good order or not."""
        ...


class Lane(Protocol):
    """Runs work in order."""

    def mark(self) -> Done | None:
        """Return what the caller has given the device so far; None: nothing that could be running."""
        ...

    def put(self, work: Work, after: Done | None) -> Done:
        """Run work after all before it on this lane, and after what is given (whose error it then has)."""
        ...

    def close(self) -> None:
        """End after all that was put."""
        ...


class StreamEvent:
    """A point in a stream of a GPU."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        """See `Done.wait`."""
        self._event.wait()

    def is_done(self) -> bool:
        """See `Done.is_done`."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class StreamLane:
    """A stream of a GPU. Work is given to it at once, so what that raises comes out of `put`.

    Args:
        name: said nowhere: streams have none.
        device: the GPU.
        is_urgent: its kernels come before those of other streams that are ready.
    """

    def __init__(self, name: str, device: torch.device, *, is_urgent: bool = False) -> None:
        self.name = name
        self._stream = torch.cuda.Stream(device, priority=-1 if is_urgent else 0)  # type: ignore[no-untyped-call]

    def mark(self) -> Done:
        """See `Lane.mark`: a point in the current stream."""
        return StreamEvent(torch.cuda.current_stream(self._stream.device))

    def put(self, work: Work, after: Done | None) -> Done:
        """See `Lane.put`."""
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.wait()
            work()
            return StreamEvent(self._stream)

    def close(self) -> None:
        """See `Lane.close`."""
        self._stream.synchronize()


class _Result:
    """What a thread does, or did."""

    def __init__(self) -> None:
        self._ended = Event()
        self._error: BaseException | None = None

    def end(self, error: BaseException | None) -> None:
        self._error = error
        self._ended.set()

    def wait(self) -> None:
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def is_done(self) -> bool:
        return self._ended.is_set()


_Queue = SimpleQueue[tuple[Work, Done | None, _Result] | None]


class ThreadLane:
    """A thread. It ends with `close`, or when nobody has the lane any more, and never keeps a process from ending.

    Args:
        name: the thread's.
    """

    def __init__(self, name: str) -> None:
        self._queue: _Queue = SimpleQueue()
        self._thread = Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._queue, self._thread, EXIT_SECONDS)

    def mark(self) -> None:
        """See `Lane.mark`: the caller has done what it did."""

    def put(self, work: Work, after: Done | None) -> Done:
        """See `Lane.put`.

        Raises:
            RuntimeError: the lane is closed, and nothing would ever run.
        """
        if not self._end.alive:
            raise RuntimeError(f"lane {self._thread.name} is closed: put nothing on it any more")
        result = _Result()
        self._queue.put((work, after, result))
        return result

    def close(self) -> None:
        """See `Lane.close`."""
        if self._end.detach():
            _end(self._queue, self._thread, None)


def _serve(queue: _Queue) -> None:
    while (item := queue.get()) is not None:
        work, after, result = item
        try:
            if after is not None:
                after.wait()
            work()
            result.end(None)
        except BaseException as error:
            result.end(error)
        del item, work, after, result  # until the next one comes, nothing of this one is kept alive


def _end(queue: _Queue, thread: Thread, seconds: float | None) -> None:
    queue.put(None)
    if thread is not current_thread():  # its own last work may have been the last to hold the lane
        thread.join(seconds)


@contextmanager
def in_main_stream(device: torch.device) -> Iterator[None]:
    """Ask for memory, or give it back, as the main stream of a GPU, whichever is the current one.

    What either was given before comes first for the other: memory of a stream that computes is nobody else's until that
    has caught up.
    """
    main, current = _streams(device)
    if main is current or main == current:
        yield
        return
    main.wait_stream(current)
    with torch.cuda.stream(main):
        yield
    current.wait_stream(main)


def _streams(device: torch.device) -> tuple[Any, Any]:
    """Return the main and the current stream; there are none but on a GPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.default_stream(device), torch.cuda.current_stream(device)


def lane_for(device: torch.device, name: str, *, is_urgent: bool = False) -> Lane:
    """Return a lane for collectives on a device's tensors: a stream of a GPU, else a thread."""
    return StreamLane(name, device, is_urgent=is_urgent) if device.type == "cuda" else ThreadLane(name)
