"""Messages between the ranks of a ring, and of a Ulysses group: what a plan names is posted here, and counted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.distributed import SentCounter

Message = tuple[int, Tensor]  # (index of the other rank in the group, contiguous tensor)


class Pending(Protocol):
    """Messages on their way."""

    def wait(self) -> None:
        """Return when (on a GPU: have the device go on when) they are there; what was sent may then be overwritten."""
        ...


class Lane(Protocol):
    """Point-to-point messages among the ranks of a ring; of one pair of ranks they arrive in the order of posting."""

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start sending, and receiving into the tensors given; none of them is touched before `wait`."""
        ...


class Exchange(Protocol):
    """Collectives among the ranks of a group."""

    def all_to_all(self, sent: Tensor) -> Tensor:
        """[ranks, ...]: entry i goes to rank i; return what came, entry i from rank i. `sent` is the caller's again."""
        ...

    def all_gather(self, own: Tensor) -> Tensor:
        """Return [ranks, ...], every rank's tensor."""
        ...

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """[ranks, ...]: return the sum over ranks of entry `own rank`."""
        ...


class _Works:
    """Handles of torch.distributed; they keep their tensors alive."""

    def __init__(self, works: list[dist.Work], tensors: list[Tensor]) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._tensors = [], []


@dataclass
class GroupLane:
    """A lane over a process group of its own.

    Attributes:
        group: ranks in the order of the ring.
        sent: what this rank has sent.
    """

    group: dist.ProcessGroup
    sent: SentCounter = field(default_factory=SentCounter)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """See `Lane.post`."""
        for _, tensor in sends:
            self.sent.count(tensor.nbytes)
        operations = [
            dist.P2POp(how, tensor, group=self.group, group_peer=peer)
            for how, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Works(works, [tensor for _, tensor in (*sends, *receives)])


@dataclass
class GroupExchange:
    """Collectives over a process group.

    Attributes:
        group: the ranks, in order.
        sent: what this rank has sent.
    """

    group: dist.ProcessGroup
    sent: SentCounter = field(default_factory=SentCounter)

    def all_to_all(self, sent: Tensor) -> Tensor:
        """See `Exchange.all_to_all`."""
        self.sent.count(sent[1:].nbytes)
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent, group=self.group)
        return came

    def all_gather(self, own: Tensor) -> Tensor:
        """See `Exchange.all_gather`."""
        size = self.group.size()
        self.sent.count(own.nbytes * (size - 1))
        gathered = own.new_empty(size * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own, group=self.group)
        return gathered.view(size, *own.shape)

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """See `Exchange.reduce_scatter`; added in the order of ranks, so that a run can be repeated to the bit."""
        return self.all_to_all(parts).sum(0)
