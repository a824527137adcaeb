"""Attention of one segment of a sequence to its own keys and to those of the segments before it.

Per segment, autograd keeps q, out and lse; keys and values stand once in the store. While a layer attends, those of all
segments up to this one lie side by side, for the kernel. Backward adds what earlier segments' keys and values get into
accumulators, in float32, and returns the segment's own gradient together with what later segments left for it. A
forward that runs again in backward (recomputation) finds its keys and values in the store.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.plan.tiles import Documents, TokenRange, Tile, plan_causal
from megatron.longseq.attention.runtime.kv_cache import SegmentGradAccumulator, SegmentKVCache, without_base, differentiable
from megatron.longseq.attention.runtime.tiled import tiled_forward, tiled_backward
from megatron.longseq.segment import Segment

Fork = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class _SegmentCall:
    """What a segment's attention is asked, apart from its tensors."""

    cache: SegmentKVCache
    layer: int
    segment: Segment
    kernel: Kernel
    scale: float
    tiles: tuple[Tile, ...]
    fork: Fork


def segment_attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: SegmentKVCache,
    layer: int,
    kernel: Kernel,
    scale: float,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    fork: Fork = nullcontext,
) -> Tensor:
    """Return causal attention [n, b, hq * dv] of the store's current segment to all keys up to its end.

    Args:
        q: [n, b, hq, d] of the current segment, rotary positions already applied at their true positions.
        k: [n, b, hk, d]; hk divides hq.
        v: [n, b, hk, dv].
        store: of this pipeline stage, with `current` set.
        layer: number of the layer, unique on the stage.
        kernel: see `kernels.choice.choose`; with dropout if that is wanted.
        scale: factor of the scores.
        window: keys before its own position that a query sees (upstream's left window); None: all.
        documents: of the whole sequence, or of the segment's positions at least: a query sees its own document alone.
        fork: context in which dropout draws its random numbers (upstream's: the model-parallel tracker's `fork`).

    Raises:
        PrefixOrderError: not this segment's turn: segments go forward from the first to the last, backward from the
            last to the first.
        ValueError: shapes that do not fit the segment, documents of other positions.
    """
    segment = cache.current_segment(layer)
    if q.shape[0] != segment.tokens:
        raise ValueError(f"layer {layer}, {segment}: {q.shape[0]} queries for {segment.tokens} of {segment.lengths}")
    q, segment = differentiable(cache, layer, segment, q, k, v)
    tiles = plan_causal(
        TokenRange(segment.begin, segment.end),
        q.shape[1],
        rectangular=kernel.rectangular,
        window=window,
        documents=documents,
    )
    return SegmentAttention.apply(q, k, v, _SegmentCall(cache, layer, segment, kernel, scale, tiles, fork))


class SegmentAttention(torch.autograd.Function):
    """See `segment_attention`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _SegmentCall) -> Tensor:
        """Write the segment's keys and values, attend to all up to its end."""
        slot = call.cache.write(call.layer, call.segment, k, v)
        ctx.call = call
        with call.fork() if call.kernel.dropout else nullcontext():
            ctx.generator = _generator_state(q) if call.kernel.dropout else None
            k, v = slot.seen(call.segment)
            out, lse = tiled_forward(call.kernel, q, k, v, call.tiles, call.scale)
        if call.segment.forward_only:
            call.cache.close(call.layer, call.segment)
        else:
            ctx.save_for_backward(without_base(q), out, lse)
        return out.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Leave earlier segments their gradients, return this one's."""
        call: _SegmentCall = ctx.call
        q, out, lse = ctx.saved_tensors
        slot = call.cache.read(call.layer, call.segment)
        collect = SegmentGradAccumulator(slot, call.segment)
        with _replayed(q, ctx.generator):
            k, v = slot.seen(call.segment)
            dq = tiled_backward(call.kernel, (q, k, v, out, lse), grad.view_as(out), call.tiles, call.scale, collect)
        assert dq is not None, "a segment has rows"
        dk, dv = collect.own()
        call.cache.count(slot)
        call.cache.close(call.layer, call.segment)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _generator_state(q: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(q.device) if q.is_cuda else torch.get_rng_state()


@contextmanager
def _replayed(q: Tensor, state: Tensor | None) -> Iterator[None]:
    """Draw the random numbers of the forward again; leave the generator as it was."""
    if state is None:
        yield
        return
    now = _generator_state(q)
    _set_generator(q, state)
    try:
        yield
    finally:
        _set_generator(q, now)


def _set_generator(q: Tensor, state: Tensor) -> None:
    if q.is_cuda:
        torch.cuda.set_rng_state(state, q.device)
    else:
        torch.set_rng_state(state)
