"""Ulysses: an all-to-all that gives every rank of a group all of the group's tokens, for its share of the heads.

Queries, keys and values travel in one collective, outputs in a second; in backward their gradients likewise. Key heads
fewer than ranks are sent to all ranks whose query heads want them, straight from where they lie, and the gradients that
come back are added up. What is unpacked comes out in the ring's order (`Layout.received_rows`), and lies where what was sent
lay: an exchange takes room for what leaves and for what comes, and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import ReceivedRows
from megatron.longseq.attention.runtime.comm import GroupCollectives
from megatron.longseq.attention.runtime.kv_cache import without_base
from megatron.longseq.attention.runtime.merge import accumulation_dtype
from megatron.longseq.attention.runtime.ring import KV


@dataclass(frozen=True)
class Ulysses:
    """The all-to-alls of one attention call.

    Attributes:
        ranks: U.
        heads: of queries and of keys before the exchange.
        arrivals: order of the tokens after it; n tokens of this rank become U * n.
        exchange: with the ranks of the group; None: U is 1.
    """

    ranks: int
    heads: Heads
    received_rows: Sequence[ReceivedRows]
    exchange: GroupCollectives | None

    def scatter_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, KV]:
        """Return this rank's heads of the group's tokens: q [U n, b, hq / U, d], and keys and values.

        Args:
            q: [n, b, hq, d].
            k, v: [n, b, hk, d]. They become [U n, b, max(hk, U) / U, d].
        """
        if self.exchange is None:
            return without_base(q), (without_base(k).contiguous(), without_base(v).contiguous())
        room = self._to_heads(q, k, v)  # once exchanged, its content is needed no more
        mine, keys, values = self._ordered(self.exchange.all_to_all(room), room, self._widths())
        return mine, (keys, values)

    def gather_outputs(self, out: Tensor) -> Tensor:
        """[U n, b, hq / U, d] to [n, b, hq, d]: the way back."""
        if self.exchange is None:
            return out
        room = self._to_sources([out])
        return _joined(self.exchange.all_to_all(room), room)

    def scatter_gradient(self, grad: Tensor) -> Tensor:
        """[n, b, hq, d] to [U n, b, hq / U, d]: the gradient of `gather_outputs`."""
        if self.exchange is None:
            return grad
        room = self._to_heads(grad)
        (mine,) = self._ordered(self.exchange.all_to_all(room), room, [room.shape[3]])
        return mine

    def gather_gradients(self, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `scatter_heads`, in dq's type.

        Args:
            grads: dq [U n, b, hq / U, d], dk and dv [U n, b, max(hk, U) / U, d], of any type; the list is emptied, so
                that each tensor can be freed once it is packed.
        """
        dtype = grads[0].dtype
        if self.exchange is None:
            dq, dk, dv = (grads.pop(0).to(dtype) for _ in range(3))
            return dq, dk, dv
        room = self._to_sources(grads)
        came = self.exchange.all_to_all(room).split(self._widths(), dim=3)
        rooms = _cut(room, [part.shape for part in came])
        if self.heads.kv < self.ranks:
            return _joined(came[0], rooms[0]), self._summed(came[1]), self._summed(came[2])
        dq, dk, dv = (_joined(part, place) for part, place in zip(came, rooms, strict=True))
        return dq, dk, dv

    def _widths(self) -> list[int]:
        """Return this rank's heads of queries, of keys, and of values."""
        own = self.heads.per_rank(self.ranks)
        return [own.query, own.kv, own.kv]

    def _to_heads(self, *tensors: Tensor) -> Tensor:
        """[n, b, h, d] each, to [U, n, b, shares, d]: to every rank the heads that it computes with; the one copy."""
        n, batch, _, dim = tensors[0].shape
        widths = [max(x.shape[2] // self.ranks, 1) for x in tensors]
        sent = tensors[0].new_empty(self.ranks, n, batch, sum(widths), dim)
        for x, part in zip(tensors, sent.split(widths, dim=3), strict=True):
            owners = min(x.shape[2], self.ranks)  # fewer than ranks: each head goes to several
            heads = x.unflatten(2, (owners, -1)).permute(2, 0, 1, 3, 4)
            part.unflatten(0, (owners, -1)).copy_(heads.unsqueeze(1))
        return sent

    def _ordered(self, came: Tensor, room: Tensor, widths: list[int]) -> list[Tensor]:
        """[U, n, b, all heads, d] to [U n, b, h, d] for each of some widths, tokens as in `received_rows`; all in `room`."""
        parts = came.split(widths, dim=3)
        placed = [place.flatten(0, 1) for place in _cut(room, [part.shape for part in parts])]
        for part, place in zip(parts, placed, strict=True):
            torch.cat([part[source, rows.slice()] for source, rows in self.received_rows], out=place)
        return placed

    def _to_sources(self, tensors: list[Tensor]) -> Tensor:
        """[U n, b, h, d] each, to [U, n, b, all heads, d] in the first one's type: every token to whom it came from."""
        first = tensors[0]
        tokens, heads = first.shape[0] // self.ranks, sum(x.shape[2] for x in tensors)
        sent = first.new_empty(self.ranks, tokens, first.shape[1], heads, first.shape[3])
        del first
        head = 0
        while tensors:
            x = tensors.pop(0)
            begin, end = 0, head + x.shape[2]
            for source, rows in self.received_rows:
                sent[source, rows.slice(), :, head:end] = x[begin : begin + rows.size]
                begin += rows.size
            head = end
        return sent

    def _summed(self, grads: Tensor) -> Tensor:
        """[U, n, b, 1, d] to [n, b, hk, d], hk fewer than U: what the ranks that share a head found, added."""
        shared = grads.unflatten(0, (self.heads.kv, -1)).squeeze(4)
        return shared.sum(1, dtype=accumulation_dtype(grads.dtype)).to(grads.dtype).permute(1, 2, 0, 3)


def _joined(came: Tensor, room: Tensor) -> Tensor:
    """[U, n, b, h, d] to [n, b, U h, d], in `room`."""
    ordered = came.permute(1, 2, 0, 3, 4)
    return room.view(ordered.shape).copy_(ordered).flatten(2, 3)


def _cut(room: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return contiguous tensors that lie one after another in a buffer and fill it."""
    pieces = room.view(-1).split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
