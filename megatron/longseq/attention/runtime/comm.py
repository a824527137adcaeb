"""Messages between the ranks of a ring, and collectives of a process group, with counts of what this rank sends."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.distributed import SentCounter

Message = tuple[int, Tensor]  # (group rank of the peer, contiguous tensor)


class P2PWork:
    """Messages in flight.

    Args:
        works: handles of torch.distributed.
        tensors: tensors that the messages need; they are kept alive.
    """

    def __init__(self, works: list[dist.Work], tensors: list[Tensor]) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        """Wait for the messages; on a GPU, make the current stream wait. Sent tensors may then be overwritten."""
        for work in self._works:
            work.wait()
        self._works, self._tensors = [], []


@dataclass
class P2PChannel:
    """Point-to-point messages among the ranks of a ring, ordered for each pair, over a process group of its own.

    Attributes:
        group: ranks in the order of the ring.
        sent: bytes and messages that this rank has sent.
    """

    group: dist.ProcessGroup
    sent: SentCounter = field(default_factory=SentCounter)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> P2PWork:
        """Start sends and receives. The tensors must not be used before `P2PWork.wait` returns.

        Args:
            sends: pairs of the receiver's index in the group and the tensor.
            receives: pairs of the sender's index in the group and the tensor to write to.
        """
        for _, tensor in sends:
            self.sent.count(tensor.nbytes)
        operations = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return P2PWork(works, [tensor for _, tensor in (*sends, *receives)])


@dataclass
class GroupCollectives:
    """Collectives among the ranks of a process group.

    Attributes:
        group: the ranks, in order.
        sent: bytes and messages that this rank has sent.
    """

    group: dist.ProcessGroup
    sent: SentCounter = field(default_factory=SentCounter)

    def all_to_all(self, sent: Tensor) -> Tensor:
        """Send entry i of [ranks, ...] to rank i; return [ranks, ...], whose entry i is from rank i."""
        self.sent.count(sent[1:].nbytes)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received

    def all_gather(self, own: Tensor) -> Tensor:
        """Return every rank's tensor, as [ranks, ...].

        Args:
            own: this rank's tensor; it has the same shape on every rank.
        """
        size = self.group.size()
        self.sent.count(own.nbytes * (size - 1))
        gathered = own.new_empty(size * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own, group=self.group)
        return gathered.view(size, *own.shape)

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """Return the sum over ranks of the entry of [ranks, ...] that has this rank's index.

        Sums in the order of ranks, so that a run repeats to the bit.

        Args:
            parts: [ranks, ...]; entry i is this rank's addend for rank i.

        Returns:
            Tensor [...], summed in the type of `parts`.
        """
        return self.all_to_all(parts).sum(0)
