"""Context-parallel ranks in one process: a thread each, messages through queues; dense attention to compare with."""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime.comm import Message
from megatron.longseq.attention.runtime.ring import RingChannels
from megatron.longseq.attention.runtime.strategies import CPStrategy
from megatron.longseq.distributed import SentCounter

PATIENCE = 30.0  # seconds until a message that does not come is an error


@dataclass
class Wire:
    """One communicator: a queue per ordered pair of ranks."""

    queues: dict[tuple[int, int], "Queue[Tensor]"] = field(default_factory=dict)

    def put(self, sender: int, receiver: int, tensor: Tensor) -> None:
        """Send a tensor."""
        self._queue(sender, receiver).put(tensor.detach().clone())

    def get(self, sender: int, receiver: int) -> Tensor:
        """Receive a tensor."""
        return self._queue(sender, receiver).get(timeout=PATIENCE)

    def _queue(self, sender: int, receiver: int) -> "Queue[Tensor]":
        return self.queues.setdefault((sender, receiver), Queue())  # atomic, unlike a defaultdict's


class _Arrival:
    """What was posted, with copies of what was sent."""

    def __init__(
        self, wire: Wire, rank: int, sends: Sequence[tuple[Tensor, Tensor]], receives: Sequence[Message]
    ) -> None:
        self._wire, self._rank, self._sends, self._receives = wire, rank, sends, receives

    def wait(self) -> None:
        for tensor, copy in self._sends:
            assert torch.equal(tensor, copy), "written to while it was on its way"
        for peer, tensor in self._receives:
            assert tensor.isnan().all(), "written to before its message came"
            received = self._wire.get(peer, self._rank)
            assert received.shape == tensor.shape and received.dtype == tensor.dtype, (received.shape, tensor.shape)
            tensor.copy_(received)
        self._sends = self._receives = ()


@dataclass
class ThreadP2P:
    """A `P2PChannel`. Until `wait`, sent tensors must not change, and received ones must not be used."""

    wire: Wire
    rank: int
    sent: SentCounter = field(default_factory=SentCounter)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        copies = [(tensor, tensor.detach().clone()) for _, tensor in sends]
        for (peer, tensor), (_, copy) in zip(sends, copies, strict=True):
            assert tensor.is_contiguous()
            self.sent.count(tensor.nbytes)
            self.wire.put(self.rank, peer, copy)
        for _, tensor in receives:
            tensor.fill_(torch.nan)
        return _Arrival(self.wire, self.rank, copies, receives)


@dataclass
class ThreadCollectives:
    """See `comm.GroupCollectives`."""

    wire: Wire
    rank: int
    size: int
    sent: SentCounter = field(default_factory=SentCounter)

    def all_to_all(self, sent: Tensor) -> Tensor:
        assert sent.shape[0] == self.size and sent.is_contiguous()
        self.sent.count(sent[1:].nbytes)
        return self._swap(list(sent))

    def all_gather(self, own: Tensor) -> Tensor:
        self.sent.count(own.nbytes * (self.size - 1))
        return self._swap([own] * self.size)

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        return self.all_to_all(parts).sum(0)

    def _swap(self, parts: list[Tensor]) -> Tensor:
        for peer, part in enumerate(parts):
            self.wire.put(self.rank, peer, part)
        return torch.stack([self.wire.get(peer, self.rank) for peer in range(self.size)])


def strategies(mesh: Mesh, *, window: int | None = None, gathers: bool = False) -> list[CPStrategy]:
    """Return every rank's spread, connected with the others'."""
    wires: dict[Any, Wire] = defaultdict(Wire)
    made = []
    for rank in range(mesh.size):
        place = mesh.place(rank)
        channels = [
            ThreadP2P(wires["ring", place.ulysses, name], place.ring) for name in ("kv", "grads", "far_kv", "far_grads")
        ]
        exchange = ThreadCollectives(wires["ulysses", place.ring], place.ulysses, mesh.ulysses)
        gather = ThreadCollectives(wires["gather", place.ulysses], place.ring, mesh.ring)
        made.append(
            CPStrategy(
                mesh,
                rank,
                ulysses=exchange if mesh.ulysses > 1 else None,
                ring=RingChannels(*channels),
                gather=gather if gathers else None,
                window=window,
            )
        )
    return made


def on_all(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run one job per rank, at the same time, and raise the exception of the first rank that fails."""
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="rank") as pool:
        futures = [pool.submit(_single_threaded, job) for job in jobs]
        return [future.result() for future in futures]


def _single_threaded(job: Callable[[], Any]) -> Any:
    assert threading.current_thread() is not threading.main_thread()
    return job()


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, documents: Documents | None = None
) -> Tensor:
    """Compute attention by its formula in the tensors' own type, [s, b, hq, d] of q, [s, b, hk, d] of k and v."""
    size, copies = q.shape[0], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
    position = torch.arange(size)
    seen = position[None, :] <= position[:, None]
    if window is not None:
        seen &= position[None, :] >= position[:, None] - window
    masks = seen.expand(q.shape[1], -1, -1).clone()
    for sequence, runs in enumerate(documents.spans if documents else ()):
        starts = torch.cat([torch.full((run.end - run.begin,), run.start) for run in runs])
        masks[sequence] &= position[None, :] >= starts[:, None]
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * scale
    weights = scores.masked_fill(~masks[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, v).flatten(2)
