"""Queues that run tasks in order beside the caller: a CUDA stream on a GPU, a thread elsewhere.

A task starts after the previous task of its queue and, if given, after a task of another queue. A stream is handed its
tasks at once. A thread runs them itself, because gloo's collectives block until they are done.
"""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any, Protocol

import torch

Task = Callable[[], None]
EXIT_SECONDS = 1.0  # how long an exiting process waits for a thread that is still at work


class Completion(Protocol):
    """The end of a task: a `torch.cuda.Event`, or `TaskEnd`."""

    def wait(self) -> None:
        """Block until the task is done and raise its error; on a GPU, make the current stream wait instead."""
        ...

    def query(self) -> bool:
        """Return whether the task has ended, with or without an error."""
        ...


class _Both:
    """The end of two tasks."""

    def __init__(self, first: Completion, second: Completion) -> None:
        self._ends = first, second

    def wait(self) -> None:
        """Wait for both."""
        for end in self._ends:
            end.wait()

    def query(self) -> bool:
        """Return whether both have ended."""
        return all(end.query() for end in self._ends)


def both(first: Completion | None, second: Completion | None) -> Completion | None:
    """Return the end of two tasks, of which either may be None."""
    if first is None or second is None:
        return first or second
    return _Both(first, second)


class CommStream:
    """A CUDA stream that runs tasks in order. They are launched at once, so `put` raises what they raise.

    Args:
        name: unused; streams have no names.
        device: the GPU.
        is_urgent: whether its kernels run before ready kernels of other streams.
    """

    def __init__(self, name: str, device: torch.device, *, is_urgent: bool = False) -> None:
        self.name = name
        self._stream = torch.cuda.Stream(device, priority=-1 if is_urgent else 0)  # type: ignore[no-untyped-call]

    def mark(self) -> Completion | None:
        """Return the end of what the caller has given the device so far: a point in the current stream."""
        return _record_event(torch.cuda.current_stream(self._stream.device))

    def put(self, task: Task, after: Completion | None) -> Completion:
        """Launch a task in the stream, after all earlier ones and after `after`.

        Args:
            task: launches kernels in the current stream.
            after: end of a task that must be done first; None: there is no such task.
        """
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.wait()
            task()
            return _record_event(self._stream)

    def close(self) -> None:
        """Block until the stream is idle."""
        self._stream.synchronize()


def _record_event(stream: torch.cuda.Stream) -> Completion:
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event  # type: ignore[no-any-return]


class TaskEnd(Future[None]):
    """The end of a thread's task; see `Completion`."""

    def wait(self) -> None:
        """Block until the task is done and raise its error."""
        self.result()

    def query(self) -> bool:
        """Return whether the task has ended."""
        return self.done()


_Queue = SimpleQueue[tuple[Task, Completion | None, TaskEnd] | None]


class CommThread:
    """A thread that runs tasks in order. It ends with `close` or its last reference, and never blocks a process's exit.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue: _Queue = SimpleQueue()
        self._thread = Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._queue, self._thread, EXIT_SECONDS)

    def mark(self) -> Completion | None:
        """Return None: without a GPU, the caller's own work is done when it calls."""
        return None

    def put(self, task: Task, after: Completion | None) -> Completion:
        """Hand the thread a task, to run after all earlier ones and after `after`, whose error it then raises.

        Args:
            task: the work.
            after: end of a task of another queue that must be done first; None: there is no such task.

        Raises:
            RuntimeError: the queue is closed.
        """
        if not self._end.alive:
            raise RuntimeError(f"{self._thread.name} is closed and cannot run more tasks")
        end = TaskEnd()
        self._queue.put((task, after, end))
        return end

    def close(self) -> None:
        """Block until all tasks are done, and end the thread."""
        if self._end.detach():
            _end(self._queue, self._thread, None)


def _serve(queue: _Queue) -> None:
    while (item := queue.get()) is not None:
        task, after, end = item
        try:
            if after is not None:
                after.wait()
            task()
            end.set_result(None)
        except BaseException as error:
            end.set_exception(error)
        del item, task, after, end  # keep nothing of this task alive while waiting for the next


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
    if device.type != "cuda":
        yield
        return
    default, current = torch.cuda.default_stream(device), torch.cuda.current_stream(device)
    if default == current:
        yield
        return
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)


CommQueue = CommStream | CommThread


def comm_queue_for(device: torch.device, name: str, *, is_urgent: bool = False) -> CommQueue:
    """Return a queue for collectives on a device's tensors: a stream on a GPU, otherwise a thread.

    Args:
        device: device of the tensors.
        name: name of the thread.
        is_urgent: whether the kernels run before ready kernels of other streams; a thread ignores it.
    """
    return CommStream(name, device, is_urgent=is_urgent) if device.type == "cuda" else CommThread(name)
