"""Ulysses: an all-to-all that gives every rank of a group all of the group's tokens, for its share of the heads.

Queries, keys and values travel in one collective, outputs in a second; in backward their gradients likewise. Key heads
fewer than ranks are sent to all ranks whose query heads want them, straight from where they lie, and the gradients that
come back are added up. What is unpacked comes out in the ring's order (`Layout.arrivals`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.longseq.attention.heads import Heads
from megatron.longseq.attention.lanes import Exchange
from megatron.longseq.attention.layout import Arrival
from megatron.longseq.attention.merge import accumulation
from megatron.longseq.attention.store import alone


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
    arrivals: Sequence[Arrival]
    exchange: Exchange | None

    def scatter_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's heads of the group's tokens: q [U n, b, hq / U, d] and keys and values together.

        Args:
            q: [n, b, hq, d].
            k, v: [n, b, hk, d]. Together they become [U n, 2, b, max(hk, U) / U, d].
        """
        if self.exchange is None:
            return alone(q), torch.stack((k, v), dim=1)
        came = self.exchange.all_to_all(self._to_heads(q, k, v))
        return self._ordered(came, self.heads.shared(self.ranks))

    def gather_outputs(self, out: Tensor) -> Tensor:
        """[U n, b, hq / U, d] to [n, b, hq, d]: the way back."""
        if self.exchange is None:
            return out
        return _joined(self.exchange.all_to_all(self._to_sources(out)))

    def scatter_gradient(self, grad: Tensor) -> Tensor:
        """[n, b, hq, d] to [U n, b, hq / U, d]: the gradient of `gather_outputs`."""
        if self.exchange is None:
            return grad
        came = self.exchange.all_to_all(self._to_heads(grad))
        return torch.cat([came[arrival.source, arrival.rows.slice()] for arrival in self.arrivals])

    def gather_gradients(self, dq: Tensor, dkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `scatter_heads`, in dq's type; dkv [U n, 2, b, max(hk, U) / U, d] of any."""
        if self.exchange is None:
            own = dkv.to(dq.dtype)
            return dq, own[:, 0], own[:, 1]
        both = self._to_sources(dq, dkv[:, 0], dkv[:, 1])
        came = self.exchange.all_to_all(both)
        share = self.heads.shared(self.ranks)
        grad_q, grad_k, grad_v = came.split((share.query, share.kv, share.kv), dim=3)
        return _joined(grad_q), self._summed(grad_k), self._summed(grad_v)

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

    def _ordered(self, came: Tensor, own: Heads) -> tuple[Tensor, Tensor]:
        """Take the fused tensor apart, tokens in the order of `arrivals`."""
        ranks, tokens, batch, _, dim = came.shape
        q = came.new_empty(ranks * tokens, batch, own.query, dim)
        kv = came.new_empty(ranks * tokens, 2, batch, own.kv, dim)
        begin = 0
        for source, rows in self.arrivals:
            part, end = came[source, rows.slice()], begin + rows.size
            q[begin:end] = part[:, :, : own.query]
            kv[begin:end] = part[:, :, own.query :].unflatten(2, (2, own.kv)).transpose(1, 2)
            begin = end
        return q, kv

    def _to_sources(self, *tensors: Tensor) -> Tensor:
        """[U n, b, h, d] each, to [U, n, b, all heads, d] in the first one's type: every token to whom it came from."""
        first = tensors[0]
        tokens, heads = first.shape[0] // self.ranks, sum(x.shape[2] for x in tensors)
        sent = first.new_empty(self.ranks, tokens, first.shape[1], heads, first.shape[3])
        begin = 0
        for source, rows in self.arrivals:
            head, end = 0, begin + rows.size
            for x in tensors:
                sent[source, rows.slice(), :, head : head + x.shape[2]] = x[begin:end]
                head += x.shape[2]
            begin = end
        return sent

    def _summed(self, grads: Tensor) -> Tensor:
        """[U, n, b, max(hk, U) / U, d] to [n, b, hk, d]: what the ranks that share a head found, added."""
        if self.heads.kv >= self.ranks:
            return _joined(grads)
        shared = grads.unflatten(0, (self.heads.kv, -1)).squeeze(4)
        return shared.sum(1, dtype=accumulation(grads.dtype)).to(grads.dtype).permute(1, 2, 0, 3)


def _joined(came: Tensor) -> Tensor:
    """[U, n, b, h, d] to [n, b, U h, d]."""
    return came.permute(1, 2, 0, 3, 4).flatten(2, 3)
