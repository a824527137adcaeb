"""Attention of tokens that are distributed over context-parallel ranks, as one autograd function.

A call exchanges heads (Ulysses), attends over the ring, and exchanges the outputs back. Saved for backward are q, keys
and values as they lie after the exchange, out and log-sum-exp; with segments, keys and values are in the KV cache.
Where upstream recomputes activations, out and log-sum-exp of the first forward are kept, and attention is not computed
again.
"""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.plan.heads import Heads, check_heads
from megatron.longseq.attention.plan.layout import Pieces
from megatron.longseq.attention.plan.ranges import Documents, TokenRange
from megatron.longseq.attention.plan.tiles import Mask
from megatron.longseq.attention.runtime.grad_sums import KV
from megatron.longseq.attention.runtime.kv_cache import (
    SegmentGradAccumulator,
    SegmentKVCache,
    differentiable,
    without_base,
)
from megatron.longseq.attention.runtime.strategies import CPCall, CPStrategy
from megatron.longseq.attention.runtime.tiled import Result
from megatron.longseq.attention.runtime.ulysses import Ulysses
from megatron.longseq.segment import Segment


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, apart from its tensors.

    Attributes:
        ulysses: exchange of heads for tokens.
        inner: attention over the ring, between the exchanges.
        segment: the segment that is computed.
        layer: number of the layer, unique on the stage.
        cache: KV cache of earlier segments; None: the sequence is one segment.
        documents: packed documents of the sequence.
    """

    ulysses: Ulysses
    inner: CPCall
    segment: Segment
    layer: int
    cache: SegmentKVCache | None
    documents: Documents | None


@dataclass
class RecomputeCache:
    """Results of attention in forwards that upstream will recompute.

    They are kept by the recomputed function and nowhere else. Upstream keeps that function in an autograd node, so they
    are freed with it: when its backward has run, or when the node is dropped without one.

    Attributes:
        active: results of the function that is running, in the order of its calls; None: none is running.
    """

    active: deque[tuple[Result, AttentionCall]] | None = field(default=None, init=False)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that keeps the results of its first run for its second run."""
        results: deque[tuple[Result, AttentionCall]] = deque()

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self.active = self.active, results
            try:
                return function(*args, **kwargs)
            finally:
                self.active = outer

        return run


def attend_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recompute: RecomputeCache,
    call_for: Callable[[AttentionCall | None], AttentionCall],
) -> Tensor:
    """Return attention [n, b, hq * d] without computing it twice where upstream recomputes activations.

    Args:
        q, k, v: see `context_attention`.
        recompute: results of first forwards.
        call_for: returns the call; given the call of the first forward where this is its recomputation, else None.
    """
    if recompute.active is not None and not torch.is_grad_enabled():
        call = call_for(None)
        out, result = forward_for_recompute(q, k, v, call)
        recompute.active.append((result, call))
        return out
    if recompute.active:
        result, first = recompute.active.popleft()
        return context_attention(q, k, v, call_for(first), result)
    return context_attention(q, k, v, call_for(None))


def make_call(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    strategy: CPStrategy,
    kernel: Kernel,
    scale: float,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    pieces: Pieces | None = None,
    layer: int = 0,
    cache: SegmentKVCache | None = None,
) -> AttentionCall:
    """Plan causal attention of this rank's tokens to the tokens of all context-parallel ranks.

    Args:
        q: [n, b, hq, d] of the tokens at `Layout.positions`.
        k: [n, b, hk, d]; hk divides hq.
        strategy: distribution over the ranks.
        kernel: see `select_kernel`; without dropout.
        scale: factor of the scores.
        window: number of keys before its own position that a query sees; None: all.
        documents: packed documents of the whole sequence.
        pieces: pieces by which the tokens are distributed over the ranks (`Layout.pieces`); None: by sequence.
        layer: number of the layer, unique on the stage; needed with `cache`.
        cache: KV cache of this stage with a current segment. The tokens are those of the segment, which also sees the
            keys of earlier ones. None: the sequence is one segment.

    Raises:
        ValueError: Shapes, heads or documents do not fit.
        SegmentOrderError: No segment is current.
    """
    ranks = strategy.mesh.size
    segment = cache.current_segment(layer) if cache is not None else Segment(0, 0, (q.shape[0] * ranks,))
    if kernel.dropout:
        raise ValueError(f"layer {layer}: attention over context-parallel ranks does not support dropout; set it to 0")
    if q.shape[0] * ranks != segment.tokens or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"layer {layer}, {segment}: queries have shape {tuple(q.shape)} and keys {tuple(k.shape)}, which does "
            f"not fit {segment.tokens} tokens on {ranks} context-parallel ranks"
        )
    heads = Heads(q.shape[2], k.shape[2])
    check_heads(strategy.mesh, heads)
    inner = strategy.plan_call(kernel, scale, segment, Mask(q.shape[1], window, documents), pieces)
    return AttentionCall(strategy.plan_ulysses(heads, segment, pieces), inner, segment, layer, cache, documents)


def context_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, result: Result | None = None) -> Tensor:
    """Return attention [n, b, hq * d], see `make_call`.

    Args:
        q: [n, b, hq, d], with rotary positions applied.
        k, v: [n, b, hk, d].
        call: the call.
        result: result of `forward_for_recompute` if this forward recomputes that one; attention is not computed again.

    Raises:
        ValueError: Values have another shape than keys.
        SegmentOrderError: It is not this segment's turn.
    """
    if v.shape != k.shape:
        raise ValueError(
            f"layer {call.layer}: values have shape {tuple(v.shape)} and keys {tuple(k.shape)}, but context-parallel "
            "ranks send both as one tensor, so the shapes must be equal"
        )
    q, segment = differentiable(call.cache, call.layer, call.segment, q, k, v)
    return ContextAttention.apply(q, k, v, replace(call, segment=segment), result)  # type: ignore[no-any-return,no-untyped-call]


def forward_for_recompute(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Result]:
    """Return attention without autograd, and the result to keep for the recomputation.

    Args:
        q, k, v, call: see `context_attention`.

    Returns:
        Attention [n, b, hq * d], and (out, lse) of this rank between the all-to-alls.
    """
    with torch.no_grad():
        q, kv = call.ulysses.scatter_heads(q, k, v)
        result = call.inner.forward(q, _visible_kv(kv, call))
        return call.ulysses.gather_outputs(result[0]).flatten(2), result


def _visible_kv(kv: KV, call: AttentionCall) -> KV:
    """Cache a segment's keys and values, and return all that it sees."""
    gathered = call.inner.gather_kv(kv)
    if call.cache is None:
        return gathered
    rows = _cache_segment(call)
    k, v = call.cache.write(call.layer, rows, *gathered).up_to(rows)
    return k, v


def _cache_segment(call: AttentionCall) -> Segment:
    """Return the call's segment with lengths in rows of the KV cache."""
    return replace(call.segment, lengths=call.inner.segment.lengths)


class ContextAttention(torch.autograd.Function):
    """Autograd function of `context_attention`."""

    clear_saved_tensors_on_access = True

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, result: Result | None) -> Tensor:
        """Exchange heads, attend, and exchange outputs."""
        q, kv = call.ulysses.scatter_heads(q, k, v)
        out, lse = call.inner.forward(q, _visible_kv(kv, call)) if result is None else result
        ctx.call = call
        if call.cache is None:
            ctx.save_for_backward(q, out, lse, *kv)
        elif call.segment.forward_only:
            call.cache.finish(call.layer, call.segment)
        else:
            # Keys and values are in the cache: q must not keep the buffer of all three alive.
            ctx.save_for_backward(without_base(q), out, lse)
        return call.ulysses.gather_outputs(out).flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run the exchanges and the ring backward."""
        call: AttentionCall = ctx.call
        grad_out = call.ulysses.scatter_gradient(grad.unflatten(2, (call.ulysses.heads.query, -1)))
        # Tensors are freed as soon as they are not needed, because the following exchange needs as much memory again.
        saved = list(ctx.saved_tensors)
        if call.cache is None:
            dq, kv_grads = _without_cache(call, saved, grad_out)
        else:
            dq, kv_grads = _with_cache(call, call.cache, saved, grad_out)
        del grad_out
        grads = [dq, *call.inner.reduce_kv_grads(kv_grads)]
        del dq, kv_grads
        return *call.ulysses.gather_gradients(grads), None, None


def _without_cache(call: AttentionCall, saved: list[Tensor], grad_out: Tensor) -> tuple[Tensor, KV]:
    """Return dq and the gradients of keys and values; empties `saved`."""
    q, out, lse, k, v = saved
    saved.clear()
    return call.inner.backward((q, call.inner.gather_kv((k, v)), out, lse), grad_out)


def _with_cache(call: AttentionCall, cache: SegmentKVCache, saved: list[Tensor], grad_out: Tensor) -> tuple[Tensor, KV]:
    """Add gradients of earlier segments to the cache; return dq and those of the segment's own keys and values."""
    rows = _cache_segment(call)
    layer = cache.read(call.layer, rows)
    q, out, lse = saved
    saved.clear()
    k, v = layer.up_to(rows)
    dq, (dk, dv) = call.inner.backward((q, (k, v), out, lse), grad_out)
    grads = SegmentGradAccumulator(layer, rows)
    grads.add(TokenRange(0, dk.shape[1]), TokenRange(0, rows.end), dk, dv)
    own_k, own_v = grads.own()
    cache.finish(call.layer, rows)
    return dq, (own_k, own_v)
