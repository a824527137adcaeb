"""Messages on their way out: each tensor is kept until its message has left, and no longer."""

import queue
import threading
from collections import deque
from typing import Any

import torch


class Outbox:
    """Keeps sent tensors alive; nothing here makes the sender wait, except `close`.

    NCCL tells whether a message has left. Gloo tells only him who waits for it, so there one thread waits in turn.

    Args:
        backend: name of the communicators' backend.
    """

    def __init__(self, backend: str) -> None:
        self.sent: deque[tuple[Any, torch.Tensor]] = deque()
        self.queue: queue.Queue[tuple[Any, torch.Tensor]] | None = None
        self.failure: BaseException | None = None
        if backend == "gloo":
            self.queue = queue.Queue()
            threading.Thread(target=self._wait_in_turn, name="longseq-outbox", daemon=True).start()

    def add(self, work: Any, tensor: torch.Tensor) -> None:
        """Keep `tensor` until `work`, its message, is done."""
        if self.queue is not None:
            self.queue.put((work, tensor))
            return
        self.sent.append((work, tensor))
        while self.sent and self.sent[0][0].is_completed():
            self.sent.popleft()

    def close(self) -> None:
        """Wait until every message has left.

        Raises:
            RuntimeError: one could not be delivered.
        """
        while self.sent:
            self.sent.popleft()[0].wait()
        if self.queue is not None:
            self.queue.join()
        if self.failure is not None:
            raise RuntimeError(f"a message could not be delivered: {self.failure}") from self.failure

    def _wait_in_turn(self) -> None:
        assert self.queue is not None
        while True:
            work, tensor = self.queue.get()
            try:
                work.wait()
            except BaseException as error:
                self.failure = self.failure or error
            del work, tensor  # before the next get(), which may wait for long
            self.queue.task_done()
