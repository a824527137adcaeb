"""How one layer's attention is spread over context-parallel ranks, and the part of it behind the all-to-all.

A `CPStrategy` belongs to a layer; a `CPCall` is it for the tokens of one call: this rank's queries, and everyone's keys.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ring_schedule import Ring, RingStep, plan_all_gather, plan_ring_attention
from megatron.longseq.attention.plan.ring_tiles import Mask
from megatron.longseq.attention.plan.tiles import TokenRange, Tile
from megatron.longseq.attention.runtime.comm import GroupCollectives
from megatron.longseq.attention.runtime.ring import KV, RingChannels, Saved, GradAccumulator, ring_backward, ring_forward
from megatron.longseq.attention.runtime.tiled import tiled_forward, tiled_backward
from megatron.longseq.attention.runtime.ulysses import Ulysses
from megatron.longseq.segment import Segment


@dataclass(frozen=True)
class CPStrategy:
    """Where a layer's attention is computed.

    Attributes:
        mesh: Ulysses and ring degrees.
        rank: this context-parallel rank: it holds chunks `rank` and 2C - 1 - `rank` of every segment.
        ulysses: collectives of its Ulysses group; None: U is 1.
        ring: lanes of its ring.
        gather: collectives of its ring, where keys are gathered (--cp-comm-type all_gather) instead of going round.
        window: ranks of a window of a double ring (--ring-window); None: a plain ring.
    """

    mesh: Mesh
    rank: int
    ulysses: GroupCollectives | None = None
    ring: RingChannels | None = None
    gather: GroupCollectives | None = None
    window: int | None = None

    def exchange(self, heads: Heads, segment: Segment) -> Ulysses:
        """Return the all-to-alls of a segment's tokens."""
        received_rows = Layout(self.mesh, segment.lengths).received_rows(range(segment.index, segment.index + 1))
        return Ulysses(self.mesh.ulysses, heads, received_rows, self.ulysses)

    def share(self, kernel: Kernel, scale: float, segment: Segment, mask: Mask) -> "Share":
        """Return how a segment's queries attend to the keys up to its end."""
        layout, place = Layout(self.mesh, segment.lengths), self.mesh.place(self.rank)
        own, seen = range(segment.index, segment.index + 1), range(segment.index + 1)
        if self.gather is not None:
            tiles = plan_all_gather(layout, place.ring, own, mask, rectangular=kernel.rectangular)
            return AllGatherCall(kernel, scale, tiles, self.gather, layout, segment.index, place.ring)
        assert self.ring is not None, "a ring has lanes, if only among one rank"
        steps = plan_ring_attention(
            Ring(self.mesh.ring, self.window or self.mesh.ring),
            layout.shards(own),
            layout.shards(seen),
            mask,
            place.ring,
            rectangular=kernel.rectangular,
        )
        return RingCall(kernel, scale, steps, self.ring, segment.per_rank(self.mesh.ring))


class CPCall(Protocol):
    """One call's attention over a ring."""

    @property
    def segment(self) -> Segment:
        """The segment, in the rows that a store keeps of it."""
        ...

    def gather_kv(self, kv: KV) -> KV:
        """Return what is kept of a segment's keys and values [n, b, hk, d] for it and for later segments."""
        ...

    def forward(self, q: Tensor, keys: KV) -> tuple[Tensor, Tensor]:
        """Return (out, lse); `keys`: what was collected up to this segment's end."""
        ...

    def backward(self, saved: Saved, grad_out: Tensor) -> tuple[Tensor, KV]:
        """Return dq and the gradients of `keys`, in the accumulation type."""
        ...

    def reduce_kv_grads(self, grads: KV) -> KV:
        """Return the gradient of `collect`: a segment's rows to the rank's own."""
        ...


@dataclass(frozen=True)
class RingCall:
    """Keys go round."""

    kernel: Kernel
    scale: float
    steps: tuple[RingStep, ...]
    channels: RingChannels
    segment: Segment

    def gather_kv(self, kv: KV) -> KV:
        """See `CPCall.collect`: the rank's own."""
        return kv

    def forward(self, q: Tensor, keys: KV) -> tuple[Tensor, Tensor]:
        """See `CPCall.forward`."""
        return ring_forward(self.kernel, q, keys, self.steps, self.channels, self.scale)

    def backward(self, saved: Saved, grad_out: Tensor) -> tuple[Tensor, KV]:
        """See `CPCall.backward`."""
        return ring_backward(self.kernel, saved, grad_out, self.steps, self.channels, self.scale)

    def reduce_kv_grads(self, grads: KV) -> KV:
        """See `CPCall.distribute`: they have come home already."""
        return grads


@dataclass(frozen=True)
class AllGatherCall:
    """Every rank gathers all keys, by position; gradients are scattered back, summed in the order of ranks."""

    kernel: Kernel
    scale: float
    tiles: tuple[Tile, ...]
    exchange: GroupCollectives
    layout: Layout
    index: int
    ring: int

    @property
    def segment(self) -> Segment:
        """See `CPCall`."""
        return Segment(0, self.index, self.layout.lengths)

    def gather_kv(self, kv: KV) -> KV:
        """See `CPCall.collect`: everyone's, by position."""
        came = self.exchange.all_gather(torch.stack(kv, dim=1))
        order = self.layout.all_gather_order(range(self.index, self.index + 1))
        keys, values = (torch.cat([came[source, rows.slice(), which] for source, rows in order]) for which in (0, 1))
        return keys, values

    def forward(self, q: Tensor, keys: KV) -> tuple[Tensor, Tensor]:
        """See `CPCall.forward`."""
        return tiled_forward(self.kernel, q, *keys, self.tiles, self.scale)

    def backward(self, saved: Saved, grad_out: Tensor) -> tuple[Tensor, KV]:
        """See `CPCall.backward`."""
        q, keys, out, lse = saved
        everything = (TokenRange(0, keys[0].shape[0]),)
        total = GradAccumulator(keys[0], everything, everything)
        dq = tiled_backward(self.kernel, (q, *keys, out, lse), grad_out, self.tiles, self.scale, total.add)
        assert dq is not None, "a segment has rows"
        return dq, total.close()

    def reduce_kv_grads(self, grads: KV) -> KV:
        """See `CPCall.distribute`."""
        ranks, dk = self.layout.mesh.ring, grads[0]
        parts = dk.new_empty(ranks, dk.shape[0] // ranks, 2, *dk.shape[1:])
        begin = 0
        for source, rows in self.layout.all_gather_order(range(self.index, self.index + 1)):
            for which, grad in enumerate(grads):
                parts[source, rows.slice(), which] = grad[begin : begin + rows.size]
            begin += rows.size
        own = self.exchange.reduce_scatter(parts)
        return own[:, 0], own[:, 1]
