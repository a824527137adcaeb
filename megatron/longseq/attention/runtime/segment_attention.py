"""Attention of one segment to its own keys and those of the segments before it, on one context-parallel rank.

Autograd saves q, out and log-sum-exp of a segment; keys and values are in the KV cache. Backward adds the gradients of
earlier segments' keys and values to their sums in the cache, in float32, and returns the segment's own gradients with
the contributions of later segments. A forward that backward recomputes finds its keys and values in the cache.

After Seq1F1B (arXiv 2406.03488).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.plan.launches import Tiles
from megatron.longseq.attention.plan.ranges import Documents, TokenRange
from megatron.longseq.attention.plan.tiles import Mask, plan_causal
from megatron.longseq.attention.runtime.kv_cache import (
    SegmentGradAccumulator,
    SegmentKVCache,
    differentiable,
    without_base,
)
from megatron.longseq.attention.runtime.tiled import tiled_backward, tiled_forward
from megatron.longseq.segment import Segment

Fork = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class _SegmentCall:
    """One call of `segment_attention`, apart from its tensors."""

    cache: SegmentKVCache
    layer: int
    segment: Segment
    kernel: Kernel
    scale: float
    tiles: Tiles
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
    """Return causal attention [n, b, hq * dv] of the current segment to all keys up to its end.

    Args:
        q: [n, b, hq, d] of the current segment, with rotary positions applied.
        k: [n, b, hk, d]; hk divides hq.
        v: [n, b, hk, dv].
        cache: KV cache of this pipeline stage, with a current segment.
        layer: number of the layer, unique on the stage.
        kernel: see `select_kernel`; with dropout if that is wanted.
        scale: factor of the scores.
        window: number of keys before its own position that a query sees (upstream's left window); None: all.
        documents: packed documents of the whole sequence, or at least of the segment's positions.
        fork: context in which dropout draws random numbers (upstream's: `fork` of the model-parallel RNG tracker).

    Raises:
        SegmentOrderError: It is not this segment's turn. Forwards run from the first segment to the last, backwards
            from the last to the first.
        ValueError: Shapes do not fit the segment, or documents its positions.
    """
    segment = cache.current_segment(layer)
    if q.shape[0] != segment.tokens:
        raise ValueError(f"layer {layer}, {segment}: {q.shape[0]} queries, but {segment.tokens} tokens")
    q, segment = differentiable(cache, layer, segment, q, k, v)
    mask = Mask(q.shape[1], window, documents)
    tiles = plan_causal(TokenRange(segment.begin, segment.end), mask, rectangular=kernel.rectangular)
    return SegmentAttention.apply(q, k, v, _SegmentCall(cache, layer, segment, kernel, scale, tiles, fork))


class SegmentAttention(torch.autograd.Function):
    """Autograd function of `segment_attention`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _SegmentCall) -> Tensor:
        """Cache the segment's keys and values, and attend to all up to its end."""
        layer = call.cache.write(call.layer, call.segment, k, v)
        ctx.call = call
        with call.fork() if call.kernel.dropout else nullcontext():
            ctx.generator = _generator_state(q) if call.kernel.dropout else None
            k, v = layer.up_to(call.segment)
            out, lse = tiled_forward(call.kernel, q, k, v, call.tiles, call.scale)
        if call.segment.forward_only:
            call.cache.finish(call.layer, call.segment)
        else:
            ctx.save_for_backward(without_base(q), out, lse)
        return out.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Add gradients of earlier segments to the cache, and return those of this one."""
        call: _SegmentCall = ctx.call
        q, out, lse = ctx.saved_tensors
        layer = call.cache.read(call.layer, call.segment)
        grads = SegmentGradAccumulator(layer, call.segment)
        with _restored_generator(q, ctx.generator):
            k, v = layer.up_to(call.segment)
            saved = (q, k, v, out, lse)
            dq = tiled_backward(call.kernel, saved, grad.view_as(out), call.tiles, call.scale, grads.add)
        assert dq is not None, "a segment has rows"
        dk, dv = grads.own()
        call.cache.finish(call.layer, call.segment)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _generator_state(q: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(q.device) if q.is_cuda else torch.get_rng_state()


@contextmanager
def _restored_generator(q: Tensor, state: Tensor | None) -> Iterator[None]:
    """Draw the random numbers of the forward again, and restore the generator's state afterwards."""
    with torch.random.fork_rng([q.device] if q.is_cuda else [], enabled=state is not None):
        if state is not None and q.is_cuda:
            torch.cuda.set_rng_state(state, q.device)
        elif state is not None:
            torch.set_rng_state(state)
        yield
