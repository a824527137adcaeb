"""Ulysses: all-to-alls that give every rank of a group all of the group's tokens for its share of the heads.

Queries, keys and values are sent in one collective and outputs in a second one; backward sends their gradients
likewise. If there are fewer key heads than ranks, a head is sent to all ranks whose query heads use it, and the
gradients that return are summed. Received rows are unpacked in the ring's order (`Layout.received_rows`) into the
buffer that was sent, so an exchange needs one buffer to send and one to receive, and no more.

After DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import accumulation_dtype
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import ReceivedRows
from megatron.longseq.attention.runtime.comm import GroupCollectives
from megatron.longseq.attention.runtime.grad_sums import KV
from megatron.longseq.attention.runtime.kv_cache import without_base
from megatron.longseq.attention.runtime.packing import put_in_order, take_in_order


@dataclass(frozen=True)
class Ulysses:
    """The all-to-alls of one attention call.

    Attributes:
        ranks: Ulysses degree U.
        heads: heads before the exchange.
        received_rows: order of the tokens after the exchange, in which n tokens of a rank become U * n.
        collectives: collectives of the Ulysses group; None: U is 1.
    """

    ranks: int
    heads: Heads
    received_rows: tuple[ReceivedRows, ...]
    collectives: GroupCollectives | None

    def scatter_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, KV]:
        """Exchange this rank's tokens with all heads for the group's tokens with this rank's heads.

        Args:
            q: [n, b, hq, d].
            k, v: [n, b, hk, d].

        Returns:
            q [U n, b, hq / U, d], and keys and values [U n, b, max(hk, U) / U, d].
        """
        if self.collectives is None:
            return without_base(q), (without_base(k).contiguous(), without_base(v).contiguous())
        buffer = self._pack_for_heads(q, k, v)  # reused after the exchange
        q, k, v = self._unpack_in_order(self.collectives.all_to_all(buffer), buffer, self._head_counts())
        return q, (k, v)

    def gather_outputs(self, out: Tensor) -> Tensor:
        """Exchange [U n, b, hq / U, d] back for [n, b, hq, d]."""
        if self.collectives is None:
            return out
        buffer = self._pack_for_sources([out])
        return _join_heads(self.collectives.all_to_all(buffer), buffer)

    def scatter_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of `gather_outputs`: [n, b, hq, d] becomes [U n, b, hq / U, d]."""
        if self.collectives is None:
            return grad
        buffer = self._pack_for_heads(grad)
        (own,) = self._unpack_in_order(self.collectives.all_to_all(buffer), buffer, [buffer.shape[3]])
        return own

    def gather_gradients(self, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `scatter_heads`, in the type of dq.

        Args:
            grads: dq [U n, b, hq / U, d], dk and dv [U n, b, max(hk, U) / U, d], of any type. The list is emptied, so
                that each tensor can be freed once it is packed.
        """
        dtype = grads[0].dtype
        if self.collectives is None:
            dq, dk, dv = (grads.pop(0).to(dtype) for _ in range(3))
            return dq, dk, dv
        buffer = self._pack_for_sources(grads)
        received = self.collectives.all_to_all(buffer).split(self._head_counts(), dim=3)
        outputs = _cut(buffer, [part.shape for part in received])
        if self.heads.kv < self.ranks:
            dq, dk, dv = received
            return _join_heads(dq, outputs[0]), self._sum_replicas(dk), self._sum_replicas(dv)
        dq, dk, dv = (_join_heads(part, output) for part, output in zip(received, outputs, strict=True))
        return dq, dk, dv

    def _head_counts(self) -> list[int]:
        """Return this rank's heads of queries, keys and values."""
        own = self.heads.per_rank(self.ranks)
        return [own.query, own.kv, own.kv]

    def _pack_for_heads(self, *tensors: Tensor) -> Tensor:
        """Pack tensors [n, b, h, d] into [U, n, b, heads, d]: for every rank, the heads that it computes with."""
        n, batch, _, dim = tensors[0].shape
        counts = [max(x.shape[2] // self.ranks, 1) for x in tensors]
        packed = tensors[0].new_empty(self.ranks, n, batch, sum(counts), dim)
        for x, part in zip(tensors, packed.split(counts, dim=3), strict=True):
            owners = min(x.shape[2], self.ranks)  # with fewer heads than ranks, each head goes to several ranks
            heads = x.unflatten(2, (owners, -1)).permute(2, 0, 1, 3, 4)
            part.unflatten(0, (owners, -1)).copy_(heads.unsqueeze(1))
        return packed

    def _unpack_in_order(self, received: Tensor, buffer: Tensor, counts: list[int]) -> list[Tensor]:
        """Unpack [U, n, b, heads, d] into tensors [U n, b, h, d] in `buffer`, with tokens as in `received_rows`."""
        parts = received.split(counts, dim=3)
        outputs = [output.flatten(0, 1) for output in _cut(buffer, [part.shape for part in parts])]
        for part, output in zip(parts, outputs, strict=True):
            take_in_order(part, self.received_rows, output)
        return outputs

    def _pack_for_sources(self, tensors: list[Tensor]) -> Tensor:
        """Pack tensors [U n, b, h, d] into [U, n, b, heads, d] of the first one's type: tokens by their source rank."""
        first = tensors[0]
        tokens, heads = first.shape[0] // self.ranks, sum(x.shape[2] for x in tensors)
        packed = first.new_empty(self.ranks, tokens, first.shape[1], heads, first.shape[3])
        del first
        head = 0
        while tensors:
            x = tensors.pop(0)
            put_in_order(packed[..., head : head + x.shape[2], :], self.received_rows, x)
            head += x.shape[2]
        return packed

    def _sum_replicas(self, grads: Tensor) -> Tensor:
        """Sum gradients [U, n, b, 1, d] of hk < U key heads over the ranks that share a head; return [n, b, hk, d]."""
        shared = grads.unflatten(0, (self.heads.kv, -1)).squeeze(4)
        return shared.sum(1, dtype=accumulation_dtype(grads.dtype)).to(grads.dtype).permute(1, 2, 0, 3)


def _join_heads(received: Tensor, output: Tensor) -> Tensor:
    """Write [U, n, b, h, d] as [n, b, U h, d] into a buffer."""
    ordered = received.permute(1, 2, 0, 3, 4)
    return output.view(ordered.shape).copy_(ordered).flatten(2, 3)


def _cut(buffer: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return contiguous tensors of some shapes that fill a buffer one after another."""
    pieces = buffer.view(-1).split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
