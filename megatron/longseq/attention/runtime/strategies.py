"""How one layer's attention is spread over context-parallel ranks, and the part of it behind the all-to-all.

A `Spread` belongs to a layer; a `Share` is it for the tokens of one call: this rank's queries, and everyone's keys.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ring_schedule import Ring, Step, plan_gathered, plan_ring
from megatron.longseq.attention.plan.ring_tiles import Mask
from megatron.longseq.attention.plan.tiles import Span, Tile
from megatron.longseq.attention.runtime.comm import Exchange
from megatron.longseq.attention.runtime.ring import Pair, RingLanes, Saved, Total, ring_backward, ring_forward
from megatron.longseq.attention.runtime.tiled import attend, attend_backward
from megatron.longseq.attention.runtime.ulysses import Ulysses
from megatron.longseq.segment import Segment


@dataclass(frozen=True)
class Spread:
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
    ulysses: Exchange | None = None
    ring: RingLanes | None = None
    gather: Exchange | None = None
    window: int | None = None

    def exchange(self, heads: Heads, segment: Segment) -> Ulysses:
        """Return the all-to-alls of a segment's tokens."""
        arrivals = Layout(self.mesh, segment.lengths).arrivals(range(segment.index, segment.index + 1))
        return Ulysses(self.mesh.ulysses, heads, arrivals, self.ulysses)

    def share(self, kernel: Kernel, scale: float, segment: Segment, mask: Mask) -> "Share":
        """Return how a segment's queries attend to the keys up to its end."""
        layout, place = Layout(self.mesh, segment.lengths), self.mesh.place(self.rank)
        own, seen = range(segment.index, segment.index + 1), range(segment.index + 1)
        if self.gather is not None:
            tiles = plan_gathered(layout, place.ring, own, mask, rectangular=kernel.rectangular)
            return GatheredShare(kernel, scale, tiles, self.gather, layout, segment.index, place.ring)
        assert self.ring is not None, "a ring has lanes, if only among one rank"
        steps = plan_ring(
            Ring(self.mesh.ring, self.window or self.mesh.ring),
            layout.shards(own),
            layout.shards(seen),
            mask,
            place.ring,
            rectangular=kernel.rectangular,
        )
        return RingShare(kernel, scale, steps, self.ring, segment.shared(self.mesh.ring))


class Share(Protocol):
    """One call's attention over a ring."""

    @property
    def segment(self) -> Segment:
        """The segment, in the rows that a store keeps of it."""
        ...

    def collect(self, kv: Pair) -> Pair:
        """Return what is kept of a segment's keys and values [n, b, hk, d] for it and for later segments."""
        ...

    def forward(self, q: Tensor, keys: Pair) -> tuple[Tensor, Tensor]:
        """Return (out, lse); `keys`: what was collected up to this segment's end."""
        ...

    def backward(self, saved: Saved, grad_out: Tensor) -> tuple[Tensor, Pair]:
        """Return dq and the gradients of `keys`, in the accumulation type."""
        ...

    def distribute(self, grads: Pair) -> Pair:
        """Return the gradient of `collect`: a segment's rows to the rank's own."""
        ...


@dataclass(frozen=True)
class RingShare:
    """Keys go round."""

    kernel: Kernel
    scale: float
    steps: tuple[Step, ...]
    lanes: RingLanes
    segment: Segment

    def collect(self, kv: Pair) -> Pair:
        """See `Share.collect`: the rank's own."""
        return kv

    def forward(self, q: Tensor, keys: Pair) -> tuple[Tensor, Tensor]:
        """See `Share.forward`."""
        return ring_forward(self.kernel, q, keys, self.steps, self.lanes, self.scale)

    def backward(self, saved: Saved, grad_out: Tensor) -> tuple[Tensor, Pair]:
        """See `Share.backward`."""
        return ring_backward(self.kernel, saved, grad_out, self.steps, self.lanes, self.scale)

    def distribute(self, grads: Pair) -> Pair:
        """See `Share.distribute`: they have come home already."""
        return grads


@dataclass(frozen=True)
class GatheredShare:
    """Every rank gathers all keys, by position; gradients are scattered back, summed in the order of ranks."""

    kernel: Kernel
    scale: float
    tiles: tuple[Tile, ...]
    exchange: Exchange
    layout: Layout
    index: int
    ring: int

    @property
    def segment(self) -> Segment:
        """See `Share`."""
        return Segment(0, self.index, self.layout.lengths)

    def collect(self, kv: Pair) -> Pair:
        """See `Share.collect`: everyone's, by position."""
        came = self.exchange.all_gather(torch.stack(kv, dim=1))
        order = self.layout.gathered(range(self.index, self.index + 1))
        keys, values = (torch.cat([came[source, rows.slice(), which] for source, rows in order]) for which in (0, 1))
        return keys, values

    def forward(self, q: Tensor, keys: Pair) -> tuple[Tensor, Tensor]:
        """See `Share.forward`."""
        return attend(self.kernel, q, *keys, self.tiles, self.scale)

    def backward(self, saved: Saved, grad_out: Tensor) -> tuple[Tensor, Pair]:
        """See `Share.backward`."""
        q, keys, out, lse = saved
        everything = (Span(0, keys[0].shape[0]),)
        total = Total(keys[0], everything, everything)
        dq = attend_backward(self.kernel, (q, *keys, out, lse), grad_out, self.tiles, self.scale, total.add)
        assert dq is not None, "a segment has rows"
        return dq, total.close()

    def distribute(self, grads: Pair) -> Pair:
        """See `Share.distribute`."""
        ranks, dk = self.layout.mesh.ring, grads[0]
        parts = dk.new_empty(ranks, dk.shape[0] // ranks, 2, *dk.shape[1:])
        begin = 0
        for source, rows in self.layout.gathered(range(self.index, self.index + 1)):
            for which, grad in enumerate(grads):
                parts[source, rows.slice(), which] = grad[begin : begin + rows.size]
            begin += rows.size
        own = self.exchange.reduce_scatter(parts)
        return own[:, 0], own[:, 1]
