"""Queues that run tasks in order beside the caller: a CUDA stream on a GPU, a thread elsewhere.

A task starts after the previous task of its queue and, if given, after a task of another queue. A stream is handed its
tasks at once. A thread runs them itself, because gloo's collectives block until they are done.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread, current_thread
from typing import Any, Protocol

import torch

Task = Callable[[], None]
EXIT_SECONDS = 1.0  # how long an exiting process waits for a thread that is still at work


class Completion(Protocol):
    """The end of a task."""

    def wait(self) -> None:
        """Block until the task is done and raise its error; on a GPU, make the current stream wait instead."""
        ...

    def is_done(self) -> bool:
        """Return whether the task has ended, with or without an error."""
        ...


class CommQueue(Protocol):
    """Runs tasks in order."""

    def mark(self) -> Completion | None:
        """Return the end of what the caller has given the device so far; None if it has ended already."""
        ...

    def put(self, task: Task, after: Completion | None) -> Completion:
        """Run a task after all earlier ones of this queue and after `after`, whose error it then raises."""
        ...

    def close(self) -> None:
        """Block until all tasks are done, and end the queue."""
        ...


class StreamEvent:
    """A point in a CUDA stream; see `Completion`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        """Make the current stream wait for this point."""
        self._event.wait()

    def is_done(self) -> bool:
        """Return whether the stream has reached this point."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class CommStream:
    """A CUDA stream; see `CommQueue`. Tasks are launched at once, so `put` raises what they raise.

    Args:
        name: unused; streams have no names.
        device: the GPU.
        is_urgent: whether its kernels run before ready kernels of other streams.
    """

    def __init__(self, name: str, device: torch.device, *, is_urgent: bool = False) -> None:
        self.name = name
        self._stream = torch.cuda.Stream(device, priority=-1 if is_urgent else 0)  # type: ignore[no-untyped-call]

    def mark(self) -> Completion:
        """Return a point in the current stream."""
        return StreamEvent(torch.cuda.current_stream(self._stream.device))

    def put(self, task: Task, after: Completion | None) -> Completion:
        """Launch a task in the stream."""
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.wait()
            task()
            return StreamEvent(self._stream)

    def close(self) -> None:
        """Block until the stream is idle."""
        self._stream.synchronize()


class _Result:
    """The end of a thread's task; see `Completion`."""

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


_Queue = SimpleQueue[tuple[Task, Completion | None, _Result] | None]


class CommThread:
    """A thread; see `CommQueue`. It ends with `close` or with its last reference, and never blocks a process's exit.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue: _Queue = SimpleQueue()
        self._thread = Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._queue, self._thread, EXIT_SECONDS)

    def mark(self) -> None:
        """Return None: without a GPU, the caller's own work is done when it calls."""

    def put(self, task: Task, after: Completion | None) -> Completion:
        """Hand the thread a task.

        Raises:
            RuntimeError: the queue is closed.
        """
        if not self._end.alive:
            raise RuntimeError(f"{self._thread.name} is closed and cannot run more tasks")
        result = _Result()
        self._queue.put((task, after, result))
        return result

    def close(self) -> None:
        """Block until all tasks are done, and end the thread."""
        if self._end.detach():
            _end(self._queue, self._thread, None)


def _serve(queue: _Queue) -> None:
    while (item := queue.get()) is not None:
        task, after, result = item
        try:
            if after is not None:
                after.wait()
            task()
            result.end(None)
        except BaseException as error:
            result.end(error)
        del item, task, after, result  # keep nothing of this task alive while waiting for the next


def _end(queue: _Queue, thread: Thread, seconds: float | None) -> None:
    queue.put(None)
    if thread is not current_thread():  # the thread's own last task may have held the last reference
        thread.join(seconds)


@contextmanager
def allocate_on_default_stream(device: torch.device) -> Iterator[None]:
    """Allocate and free memory inside in the default stream of a GPU, whichever stream is current; CPU: do nothing.

    Each of the two streams waits for what the other was given before: memory of a stream cannot be used by another one
    until that stream has caught up.
    """
    default, current = _streams(device)
    if default is current or default == current:
        yield
        return
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)


def _streams(device: torch.device) -> tuple[Any, Any]:
    """Return the default and the current stream of a GPU; None for other devices."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.default_stream(device), torch.cuda.current_stream(device)


def comm_queue_for(device: torch.device, name: str, *, is_urgent: bool = False) -> CommQueue:
    """Return a queue for collectives on a device's tensors: a stream on a GPU, otherwise a thread."""
    return CommStream(name, device, is_urgent=is_urgent) if device.type == "cuda" else CommThread(name)
