"""Attention of tokens that are spread over context-parallel ranks: Ulysses, ring, both, and segments of a sequence.

One autograd node per call: heads are exchanged, attention runs over the ring, outputs are exchanged back. Kept for
backward are q, keys and values as they lie after the exchange, out and log-sum-exp; with segments, keys and values
stand once in the store. Where upstream computes activations again, out and log-sum-exp of the first forward are kept
with the function that upstream repeats, and attention is not run a second time.
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
from megatron.longseq.attention.plan.ring_tiles import Mask
from megatron.longseq.attention.plan.tiles import Documents, TokenRange
from megatron.longseq.attention.runtime.kv_cache import SegmentGradAccumulator, SegmentKVCache, without_base, differentiable
from megatron.longseq.attention.runtime.ring import KV
from megatron.longseq.attention.runtime.strategies import CPCall, CPStrategy
from megatron.longseq.attention.runtime.ulysses import Ulysses
from megatron.longseq.segment import Segment


@dataclass
class RecomputeCache:
    """Results of forwards that will be computed again.

    They lie with the function that runs twice, and nowhere else. Upstream keeps that function in a node of autograd:
    when the node goes, because its backward is done or because there will be none, so do the results.

    Attributes:
        now: results of the function that is running, in the order of its calls; None: no such function is.
    """

    now: deque[Any] | None = field(default=None, init=False)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function with room for the results of its first run, which its second run takes."""
        results: deque[Any] = deque()

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self.active = self.active, results
            try:
                return function(*args, **kwargs)
            finally:
                self.active = outer

        return run


@dataclass(frozen=True)
class AttentionCall:
    """What is asked of one call, apart from its tensors.

    Attributes:
        exchange: heads against tokens.
        share: attention over the ring.
        segment: which segment of which micro-batch.
        layer: number of the layer, unique on the stage.
        store: of segments' keys and values; None: the sequence is one segment.
        documents: of the sequence.
    """

    exchange: Ulysses
    share: CPCall
    segment: Segment
    layer: int
    cache: SegmentKVCache | None
    documents: Documents | None


Result = tuple[Tensor, Tensor]  # out before it is exchanged back, log-sum-exp


def make_call(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    strategy: CPStrategy,
    kernel: Kernel,
    scale: float,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    layer: int = 0,
    cache: SegmentKVCache | None = None,
) -> AttentionCall:
    """Plan causal attention of this rank's tokens to the tokens of all ranks.

    Args:
        q: [n, b, hq, d] of the tokens of `Layout.positions`.
        k: [n, b, hk, d]; hk divides hq.
        spread: over which ranks.
        kernel: see `kernels.choice.choose`, without dropout.
        scale: factor of the scores.
        window: keys before its own position that a query sees; None: all.
        documents: of the whole sequence; a query sees its own document alone.
        layer: number of the layer, unique on the stage; needed with `store`.
        store: of this stage, with `current` set: the tokens are those of the current segment, and the keys of earlier
            segments are seen, too.

    Raises:
        ValueError: shapes, heads or documents that do not fit.
        PrefixOrderError: no segment is current.
    """
    ranks = strategy.mesh.size
    segment = cache.current_segment(layer) if cache is not None else Segment(0, 0, (q.shape[0] * ranks,))
    if kernel.dropout:
        raise ValueError(f"layer {layer}: no dropout of attention weights over context-parallel ranks")
    if q.shape[0] * ranks != segment.tokens or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"layer {layer}, {segment}: queries {tuple(q.shape)} and keys {tuple(k.shape)} on a rank, for "
            f"{segment.tokens} tokens on {ranks} context-parallel ranks"
        )
    heads = Heads(q.shape[2], k.shape[2])
    check_heads(strategy.mesh, heads)
    share = strategy.share(kernel, scale, segment, Mask(q.shape[1], window, documents))
    return AttentionCall(strategy.exchange(heads, segment), share, segment, layer, cache, documents)


def context_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, result: Result | None = None) -> Tensor:
    """Return attention [n, b, hq * d], see `make_call`.

    Args:
        q: [n, b, hq, d], rotary positions already applied.
        k, v: [n, b, hk, d].
        call: what is asked.
        result: of `forward_for_recompute`, when this forward is a repetition: attention itself is not computed again.

    Raises:
        ValueError: values of another shape than keys.
        PrefixOrderError: not this segment's turn.
    """
    if v.shape != k.shape:
        raise ValueError(
            f"layer {call.layer}: values {tuple(v.shape)} beside keys {tuple(k.shape)}; over context-parallel ranks "
            "they travel together and have one shape"
        )
    q, segment = differentiable(call.cache, call.layer, call.segment, q, k, v)
    return ContextAttention.apply(q, k, v, replace(call, segment=segment), result)  # type: ignore[no-any-return,no-untyped-call]


def forward_for_recompute(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Result]:
    """As `context_attention` without autograd, for a forward that will be repeated: also return what to keep of it."""
    with torch.no_grad():
        heads, kv = call.exchange.scatter_heads(q, k, v)
        result = call.share.forward(heads, _keys(kv, call))
        return call.exchange.gather_outputs(result[0]).flatten(2), result


def _keys(kv: KV, call: AttentionCall) -> KV:
    """Return the keys and values that are seen from here; write the segment's own into the store."""
    keys = call.share.gather_kv(kv)
    if call.cache is None:
        return keys
    rows = _rows(call)
    whole = call.cache.write(call.layer, rows, *keys).seen(rows)
    return whole[0], whole[1]


def _rows(call: AttentionCall) -> Segment:
    """Return the call's segment in rows of the store."""
    return Segment(call.segment.microbatch, call.segment.index, call.share.segment.lengths, call.segment.forward_only)


class ContextAttention(torch.autograd.Function):
    """See `context_attention`."""

    clear_saved_tensors_on_access = True

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, result: Result | None) -> Tensor:
        """Exchange, attend, exchange back."""
        heads, kv = call.exchange.scatter_heads(q, k, v)
        out, lse = call.share.forward(heads, _keys(kv, call)) if result is None else result
        ctx.call = call
        if call.cache is None:
            ctx.save_for_backward(heads, out, lse, *kv)
        elif call.segment.forward_only:
            call.cache.close(call.layer, call.segment)
        else:
            # Keys and values stand in the store: q must not keep the buffer alive in which all three came.
            ctx.save_for_backward(without_base(heads), out, lse)
        return call.exchange.gather_outputs(out).flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The same way back."""
        call: AttentionCall = ctx.call
        grad_out = call.exchange.scatter_gradient(grad.unflatten(2, (call.exchange.heads.query, -1)))
        # What is no longer needed is let go at once: the exchange that follows needs as much again.
        saved = list(ctx.saved_tensors)
        if call.cache is None:
            dq, grads = _without_store(call, saved, grad_out)
        else:
            dq, grads = _with_store(call, call.cache, saved, grad_out)
        del grad_out
        three = [dq, *call.share.reduce_kv_grads(grads)]
        del dq, grads
        return *call.exchange.gather_gradients(three), None, None


def _without_store(call: AttentionCall, saved: list[Tensor], grad_out: Tensor) -> tuple[Tensor, KV]:
    """Return dq and the gradients of keys and values; empties what was saved."""
    heads, out, lse, k, v = saved
    saved.clear()
    return call.share.backward((heads, call.share.gather_kv((k, v)), out, lse), grad_out)


def _with_store(call: AttentionCall, cache: SegmentKVCache, saved: list[Tensor], grad_out: Tensor) -> tuple[Tensor, KV]:
    """Leave earlier segments their gradients in the store; return dq and the gradients of the segment's own rows."""
    rows = _rows(call)
    slot = cache.read(call.layer, rows)
    q, out, lse = saved
    saved.clear()
    k, v = slot.seen(rows)
    dq, (dk, dv) = call.share.backward((q, (k, v), out, lse), grad_out)
    collect = SegmentGradAccumulator(slot, rows)
    collect(TokenRange(0, dk.shape[1]), TokenRange(0, rows.end), dk, dv)
    own_k, own_v = collect.own()
    cache.count(slot)
    cache.close(call.layer, rows)
    return dq, (own_k, own_v)
