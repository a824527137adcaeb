"""Collectives of a rank, seen where torch.distributed's operators are called: by whatever code, in whatever thread."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 4096  # bytes below which a call is about losses, norms and flags, and not counted

# Of an operator: which argument has what all ranks have together, which is the group, and rings' rounds.
_RINGS = {
    "_allgather_base_": (0, 2, 1),
    "allgather_into_tensor_coalesced_": (0, 2, 1),
    "_reduce_scatter_base_": (1, 2, 1),
    "reduce_scatter_tensor_coalesced_": (1, 2, 1),
    "allreduce_": (0, 1, 2),
}


class SentMessages:
    """What a rank has sent, message by message or as rings send it: of n pieces all but one, twice for an all-reduce.

    Attributes:
        bytes: by the ranks that took part.
        collectives: calls and messages, by the same.
    """

    def __init__(self) -> None:
        self.bytes: Counter[tuple[int, ...]] = Counter()
        self.collectives: Counter[tuple[int, ...]] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, args: tuple[Any, ...]) -> None:
        """Count a call of an operator of c10d.

        Raises:
            NotImplementedError: a large one that is no such ring.
        """
        if name == "recv_":
            return
        if name == "send":
            self._count(args[1], sum(tensor.nbytes for tensor in _tensors(args[0])))
            return
        if name not in _RINGS:
            if max((tensor.nbytes for tensor in _tensors(args)), default=0) >= SMALL:
                raise NotImplementedError(
                    f"c10d::{name} in a benchmark that counts bytes: say in {__name__} what it sends"
                )
            return
        whole, group, rounds = _RINGS[name]
        ranks = dist.ProcessGroup.unbox(args[group]).size()
        size = sum(tensor.nbytes for tensor in _tensors(args[whole]))
        if size >= SMALL:
            self._count(args[group], size // ranks * (ranks - 1) * rounds)

    def _count(self, group: Any, size: int) -> None:
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        with self._lock:
            self.bytes[ranks] += size
            self.collectives[ranks] += 1

    def __sub__(self, before: "SentMessages") -> "SentMessages":
        rest = SentMessages()
        rest.bytes, rest.collectives = self.bytes - before.bytes, self.collectives - before.collectives
        return rest

    def copy(self) -> "SentMessages":
        """Return what was seen until now."""
        return self - SentMessages()

    def __getstate__(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "collectives": self.collectives}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


class _CallRecorder(TorchDispatchMode):
    def __init__(self, seen: SentMessages) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen.add(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))


@contextmanager
def watching() -> Iterator[SentMessages]:
    """Record all collectives of this thread, and of threads that start meanwhile."""
    seen, run = SentMessages(), threading.Thread.run

    def watched(thread: threading.Thread) -> None:
        with _CallRecorder(seen):
            run(thread)

    with mock.patch.object(threading.Thread, "run", watched), _CallRecorder(seen):
        yield seen
