"""Strategies by which a layer's attention is distributed over context-parallel ranks.

A `CPStrategy` belongs to a layer. A `CPCall` is the part of one call between the all-to-alls: this rank's queries and
the keys of all ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.launches import Tiles
from megatron.longseq.attention.plan.layout import Layout, Mesh, Pieces
from megatron.longseq.attention.plan.ranges import TokenRange
from megatron.longseq.attention.plan.ring_schedule import Ring, RingStep, plan_all_gather, plan_layout_ring
from megatron.longseq.attention.plan.tiles import Mask
from megatron.longseq.attention.runtime.comm import GroupCollectives
from megatron.longseq.attention.runtime.grad_sums import KV, GradAccumulator
from megatron.longseq.attention.runtime.packing import put_in_order, take_in_order
from megatron.longseq.attention.runtime.ring import RingChannels, Saved, ring_backward, ring_forward
from megatron.longseq.attention.runtime.tiled import tiled_backward, tiled_forward
from megatron.longseq.attention.runtime.ulysses import Ulysses
from megatron.longseq.segment import Segment


@dataclass(frozen=True)
class CPStrategy:
    """How one layer's attention is distributed, with the communicators of this rank.

    Attributes:
        mesh: Ulysses and ring degrees.
        rank: context-parallel rank; it holds chunks `rank` and 2C - 1 - `rank` of every segment.
        ulysses: collectives of its Ulysses group; None: U is 1.
        ring: channels of its ring.
        gather: collectives of its ring if keys are all-gathered (--cp-comm-type all_gather); None: they go round it.
        window: ranks of a window of a double ring (--ring-window); None: a plain ring.
    """

    mesh: Mesh
    rank: int
    ulysses: GroupCollectives | None = None
    ring: RingChannels | None = None
    gather: GroupCollectives | None = None
    window: int | None = None

    def plan_ulysses(self, heads: Heads, segment: Segment, pieces: Pieces | None = None) -> Ulysses:
        """Return the all-to-alls of a segment; for `pieces` see `Layout`.

        Args:
            heads: heads before the exchange.
            segment: the segment, whose lengths are tokens of all ranks.
            pieces: see `Layout`.
        """
        layout = Layout(self.mesh, segment.lengths, pieces=pieces)
        rows = layout.received_rows(range(segment.index, segment.index + 1)) if self.ulysses is not None else ()
        return Ulysses(self.mesh.ulysses, heads, rows, self.ulysses)

    def plan_call(
        self, kernel: Kernel, scale: float, segment: Segment, mask: Mask, pieces: Pieces | None = None
    ) -> "CPCall":
        """Return the attention of a segment's queries to all keys up to its end.

        Args:
            kernel: computes blocks.
            scale: factor of the scores.
            segment: the segment, whose lengths are tokens of all ranks.
            mask: causal mask with documents and window.
            pieces: see `Layout`.
        """
        layout, place = Layout(self.mesh, segment.lengths, pieces=pieces), self.mesh.place(self.rank)
        if self.gather is not None:
            own = range(segment.index, segment.index + 1)
            tiles = plan_all_gather(layout, place.ring, own, mask, rectangular=kernel.rectangular)
            return AllGatherCall(kernel, scale, tiles, self.gather, layout, segment.index)
        assert self.ring is not None, "every rank has a ring, if only of one rank"
        ring = Ring(self.mesh.ring, self.window or self.mesh.ring)
        steps = plan_layout_ring(ring, layout, segment.index, mask, place.ring, rectangular=kernel.rectangular)
        return RingCall(kernel, scale, steps, self.ring, segment.per_rank(self.mesh.ring))


@dataclass(frozen=True)
class RingCall:
    """Attention of one call: keys and values go round the ring.

    Attributes:
        kernel: computes blocks.
        scale: factor of the scores.
        steps: this rank's steps of the ring.
        channels: channels of the ring.
        segment: the segment with lengths in rows of the KV cache.
    """

    kernel: Kernel
    scale: float
    steps: tuple[RingStep, ...]
    channels: RingChannels
    segment: Segment

    def gather_kv(self, kv: KV) -> KV:
        """Return the keys and values to cache of a segment, from this rank's [n, b, hk, d]: a rank caches its own."""
        return kv

    def forward(self, q: Tensor, kv: KV) -> tuple[Tensor, Tensor]:
        """Return attention of this rank's queries to the keys that they see.

        Args:
            q: [U n, b, hq / U, d].
            kv: what `gather_kv` returned of all segments up to this one.

        Returns:
            out, of the shape of q, and lse [b, hq / U, U n].
        """
        return ring_forward(self.kernel, q, kv, self.steps, self.channels, self.scale)

    def backward(self, saved: Saved, grad_out: Tensor) -> tuple[Tensor, KV]:
        """Return the gradients of `forward`.

        Args:
            saved: q, keys and values, out and lse of `forward`.
            grad_out: gradient of out.

        Returns:
            dq in the shape of q, and the gradients of `kv` in the accumulation dtype.
        """
        return ring_backward(self.kernel, saved, grad_out, self.steps, self.channels, self.scale)

    def reduce_kv_grads(self, grads: KV) -> KV:
        """Return the gradient of `gather_kv`, [n, b, hk, d]: the ring has returned it to the owner."""
        return grads


@dataclass(frozen=True)
class AllGatherCall:
    """Attention of one call, as `RingCall`: every rank gathers all keys in order of position.

    Their gradients are reduce-scattered in the order of ranks.

    Attributes:
        kernel: computes blocks.
        scale: factor of the scores.
        tiles: blocks that this rank computes, see `plan_all_gather`.
        collectives: collectives of the ring's ranks.
        layout: positions of the tokens.
        index: index of the segment.
    """

    kernel: Kernel
    scale: float
    tiles: Tiles
    collectives: GroupCollectives
    layout: Layout
    index: int

    @property
    def segment(self) -> Segment:
        """See `RingCall.segment`."""
        return Segment(0, self.index, self.layout.lengths)

    def gather_kv(self, kv: KV) -> KV:
        """See `RingCall.gather_kv`: all ranks', in order of position."""
        gathered = self.collectives.all_gather(torch.stack(kv, dim=1))
        order = self.layout.all_gather_order(range(self.index, self.index + 1))
        k, v = (take_in_order(gathered[:, :, which], order) for which in (0, 1))
        return k, v

    def forward(self, q: Tensor, kv: KV) -> tuple[Tensor, Tensor]:
        """See `RingCall.forward`."""
        return tiled_forward(self.kernel, q, *kv, self.tiles, self.scale)

    def backward(self, saved: Saved, grad_out: Tensor) -> tuple[Tensor, KV]:
        """See `RingCall.backward`."""
        q, kv, out, lse = saved
        all_rows = (TokenRange(0, kv[0].shape[0]),)
        grads = GradAccumulator(kv[0], all_rows, all_rows)
        dq = tiled_backward(self.kernel, (q, *kv, out, lse), grad_out, self.tiles, self.scale, grads.add)
        assert dq is not None, "a segment has rows"
        return dq, grads.result()

    def reduce_kv_grads(self, grads: KV) -> KV:
        """See `RingCall.reduce_kv_grads`."""
        ranks, dk = self.layout.mesh.ring, grads[0]
        parts = dk.new_empty(ranks, dk.shape[0] // ranks, 2, *dk.shape[1:])
        order = self.layout.all_gather_order(range(self.index, self.index + 1))
        for which, grad in enumerate(grads):
            put_in_order(parts[:, :, which], order, grad)
        own = self.collectives.reduce_scatter(parts)
        return own[:, 0], own[:, 1]


CPCall = RingCall | AllGatherCall
