"""KV cache of earlier segments, and the gradients that later segments contribute to them, on one pipeline stage.

Each segment has tensors of its own, allocated in its forward and freed after its backward; so have the gradients. There
is no pool: freed memory serves any later allocation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import accumulation_dtype
from megatron.longseq.attention.plan.ranges import TokenRange
from megatron.longseq.segment import Segment


class SegmentOrderError(RuntimeError):
    """A segment runs out of order, or none is current."""


@dataclass(slots=True)
class LayerCache:
    """Cache of one layer and one micro-batch.

    Attributes:
        lengths: rows of every segment.
        parts: keys and values [n, ...] of every segment whose forward has run and whose backward has not.
        left: segments whose backward has not run.
        frozen: number of first segments in which nothing needs a gradient, so that they have no backward.
        grads: sums of the gradients that later segments contribute, by segment, in the accumulation dtype.
        written: segments whose forward has run.
    """

    lengths: tuple[int, ...]
    parts: list[tuple[Tensor, ...]] = field(default_factory=list)
    left: int = field(init=False)
    frozen: int = 0
    grads: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    written: int = 0

    def __post_init__(self) -> None:
        self.left = len(self.lengths)

    @property
    def next_backward(self) -> int:
        """Index of the segment whose backward is next, once all forwards have run."""
        return self.frozen + self.left - 1

    def up_to(self, segment: Segment) -> tuple[Tensor, ...]:
        """Return keys and values up to a segment's end as one tensor each; copies them unless there is one segment.

        Args:
            segment: the last segment to include.

        Returns:
            Keys and values, each [rows of all segments up to this one, ...].
        """
        parts = self.parts[: segment.index + 1]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    def add(self, batch: TokenRange, keys: TokenRange, grads: Sequence[Tensor]) -> None:
        """Add gradients [keys, sequences, ...] of keys and values to the sums of their segments.

        Args:
            batch: sequences of the batch.
            keys: rows of the keys, counted from the start of the first segment.
            grads: dk and dv, each [keys, sequences, ...].
        """
        begin = 0
        for index, length in enumerate(self.lengths):
            rows = TokenRange(max(keys.begin, begin) - begin, min(keys.end, begin + length) - begin)
            if rows.size > 0 and index >= self.frozen:
                first = begin + rows.begin - keys.begin
                self._add(index, batch, rows, [grad[first : first + rows.size] for grad in grads])
            begin += length

    def _add(self, index: int, batch: TokenRange, rows: TokenRange, grads: Sequence[Tensor]) -> None:
        if index not in self.grads:
            part = self.parts[index]
            totals = tuple(torch.empty_like(x, dtype=accumulation_dtype(x.dtype)) for x in part)
            self.grads[index] = totals
            if all(total.shape == grad.shape for total, grad in zip(totals, grads, strict=True)):
                for total, grad in zip(totals, grads, strict=True):
                    total.copy_(grad)
                return
            for total in totals:
                total.zero_()
        for total, grad in zip(self.grads[index], grads, strict=True):
            total[rows.slice(), batch.slice()].add_(grad)


class SegmentGradAccumulator:
    """Sums dk and dv over the blocks of a segment: those of earlier segments in their cache, the segment's own here.

    Args:
        layer: cache of the layer and micro-batch.
        segment: the segment whose backward runs.
    """

    def __init__(self, layer: LayerCache, segment: Segment) -> None:
        self._layer, self._segment = layer, segment
        self._own: tuple[Tensor, ...] | None = layer.grads.get(segment.index)

    def add(self, batch: TokenRange, keys: TokenRange, dk: Tensor, dv: Tensor) -> None:
        """Add the gradients [keys, sequences, ...] of a block. The tensors may become the sum and change later.

        Args:
            batch: sequences of the batch.
            keys: rows of the keys, counted from the start of the first segment.
            dk, dv: [keys, sequences, ...].
        """
        border = self._segment.begin
        before = max(0, min(border, keys.end) - keys.begin)
        if before:
            self._layer.add(batch, TokenRange(keys.begin, keys.begin + before), (dk[:before], dv[:before]))
        if before < keys.size:
            rows = TokenRange(keys.begin + before - border, keys.end - border)
            self._add_own(batch, rows, (dk[before:], dv[before:]))

    def own(self) -> tuple[Tensor, ...]:
        """Return the segment's own dk and dv, with the contributions of later segments, not rounded yet.

        Returns:
            dk and dv, each [rows of the segment, ...], in the accumulation dtype.
        """
        if self._own is None:
            self._own = self._zeros()
        return self._own

    def _add_own(self, batch: TokenRange, rows: TokenRange, grads: tuple[Tensor, ...]) -> None:
        part = self._layer.parts[self._segment.index]
        if self._own is None and all(x.shape == grad.shape for x, grad in zip(part, grads, strict=True)):
            self._own = tuple(without_base(grad) for grad in grads)  # converted below if more is added
            return
        if self._own is None:
            self._own = self._zeros()
        wide = tuple(
            x if x.dtype == accumulation_dtype(x.dtype) else x.to(accumulation_dtype(x.dtype)) for x in self._own
        )
        for total, grad in zip(wide, grads, strict=True):
            total[rows.slice(), batch.slice()].add_(grad)
        self._own = wide

    def _zeros(self) -> tuple[Tensor, ...]:
        part = self._layer.parts[self._segment.index]
        return tuple(torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in part)


class SegmentKVCache:
    """Caches of all layers and micro-batches of a stage.

    A cache lives from the forward of a micro-batch's first segment to the backward of that segment; in a forward-only
    pass, to the forward of the last segment.

    Attributes:
        current: the segment that runs. The executor sets it before every forward *and before every backward*, in which
            recomputation runs forwards again. Autograd may run these in other threads, so it is a plain attribute.
    """

    def __init__(self) -> None:
        self.current: Segment | None = None
        self._layers: dict[tuple[int, int], LayerCache] = {}

    def current_segment(self, layer: int) -> Segment:
        """Return the current segment.

        Raises:
            SegmentOrderError: No segment is current.
        """
        if self.current is None:
            raise SegmentOrderError(
                f"layer {layer}: attention runs without a current segment; set cache.current before each forward and "
                "backward of a segment"
            )
        return self.current

    def write(self, layer: int, segment: Segment, *tensors: Tensor) -> LayerCache:
        """Cache a segment's keys and values [n, ...]. A forward that backward recomputes finds them cached.

        Args:
            layer: number of the layer, unique on the stage.
            segment: the segment whose forward runs.
            tensors: keys and values, each [n, ...].

        Raises:
            SegmentOrderError: It is not this segment's turn.
            ValueError: The shapes do not fit the segment or the micro-batch.
        """
        cache = self._layers.get((layer, segment.microbatch)) or self._open(layer, segment)
        recomputed = (
            cache.written == segment.count and segment.index == cache.next_backward and not segment.forward_only
        )
        if segment.lengths != cache.lengths or not (segment.index == cache.written or recomputed):
            raise SegmentOrderError(f"layer {layer}, {segment}: forward out of order; {_progress(cache)}")
        like = cache.parts[0] if cache.parts else tensors
        for first, new in zip(like, tensors, strict=True):
            expected = (segment.tokens, *first.shape[1:])
            if new.shape != expected or new.dtype != first.dtype:
                raise ValueError(
                    f"layer {layer}, {segment}: keys or values are {new.dtype} {tuple(new.shape)}, not {first.dtype} "
                    f"{expected}, for {segment.tokens} tokens of segments {segment.lengths}"
                )
        if not recomputed:
            cache.parts.append(tuple(without_base(x.detach()).contiguous() for x in tensors))
            cache.written += 1
        return cache

    def read(self, layer: int, segment: Segment) -> LayerCache:
        """Return the cache for the backward of a segment.

        Args:
            layer: number of the layer, unique on the stage.
            segment: the segment whose backward runs.

        Raises:
            SegmentOrderError: It is not this segment's turn, or another segment is current.
        """
        cache = self._layers.get((layer, segment.microbatch))
        if cache is None:
            raise SegmentOrderError(f"layer {layer}, {segment}: backward, but the cache is empty for this micro-batch")
        current = self.current_segment(layer)
        if (current.microbatch, current.index) != (segment.microbatch, segment.index):
            raise SegmentOrderError(f"layer {layer}, {segment}: backward, but the current segment is {self.current}")
        if cache.written != segment.count or segment.index != cache.next_backward:
            raise SegmentOrderError(f"layer {layer}, {segment}: backward out of order; {_progress(cache)}")
        return cache

    def may_need_grad(self, layer: int, microbatch: int) -> bool:
        """Return whether keys are cached of this micro-batch that may need a gradient."""
        cache = self._layers.get((layer, microbatch))
        return cache is not None and cache.written > cache.frozen

    def finish(self, layer: int, segment: Segment) -> None:
        """Free what a segment's backward no longer needs; of a forward-only segment, count its forward instead.

        Args:
            layer: number of the layer, unique on the stage.
            segment: the segment whose backward (forward-only: whose forward) has run.
        """
        cache = self._layers[layer, segment.microbatch]
        cache.left -= 1
        if segment.forward_only:
            cache.frozen += 1
        else:
            del cache.parts[segment.index]
            cache.grads.pop(segment.index, None)
        if cache.left == 0:
            del self._layers[layer, segment.microbatch]

    def release(self, microbatch: int) -> None:
        """Free the caches of a finished micro-batch whose backward never ran: the layer's output needed no gradient."""
        for layer, index in list(self._layers):
            cache = self._layers[layer, index]
            if index == microbatch and cache.written == cache.left == len(cache.lengths):
                del self._layers[layer, index]

    def assert_empty(self) -> None:
        """Check at the end of a step that the backward of every segment has run.

        Raises:
            SegmentOrderError: Lists what is left by layer and micro-batch.
        """
        if self._layers:
            left = [
                f"layer {layer}, micro-batch {mb}: {_progress(cache)}" for (layer, mb), cache in self._layers.items()
            ]
            shown = "; ".join(left[:8]) + (f"; and {len(left) - 8} more" if len(left) > 8 else "")
            raise SegmentOrderError(f"the KV cache is not empty at the end of the step: {shown}")

    def reset(self) -> None:
        """Free everything after a step that did not finish."""
        self._layers.clear()
        self.current = None

    def _open(self, layer: int, segment: Segment) -> LayerCache:
        if segment.index:
            raise SegmentOrderError(f"layer {layer}, {segment}: forward, but segment 0 of this micro-batch has not run")
        cache = self._layers[layer, segment.microbatch] = LayerCache(segment.lengths)
        return cache


def differentiable(
    cache: SegmentKVCache | None, layer: int, segment: Segment, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Segment]:
    """Return queries and segment such that autograd runs the backward of this attention if one is needed.

    Keys of earlier segments may need a gradient where nothing of this segment does: a script may train only the first
    tokens of a sequence (a prompt). Autograd does not see these keys, so the queries are made to require a gradient in
    their place. If neither needs a gradient, the segment is marked as forward-only. Outside of autograd, as in the
    first forward of what is recomputed, this is not known, and nothing is changed.

    Args:
        cache: KV cache of the stage; None: the sequence is one segment.
        layer: number of the layer, unique on the stage.
        segment: the segment that runs.
        q: queries [n, b, hq, d].
        k, v: keys and values [n, b, hk, d].

    Returns:
        `q`, or its values detached and requiring a gradient; and the segment, perhaps marked as forward-only.
    """
    if segment.forward_only or not torch.is_grad_enabled() or any(x.requires_grad for x in (q, k, v)):
        return q, segment
    if cache is not None and cache.may_need_grad(layer, segment.microbatch):
        return q.detach().requires_grad_(), segment
    return q, replace(segment, forward_only=True)


def without_base(x: Tensor) -> Tensor:
    """Return a tensor that keeps no larger storage than its own alive: a slice of a fused projection is copied."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def _progress(cache: LayerCache) -> str:
    """Return which forwards and backwards of a micro-batch have run."""
    count = len(cache.lengths)
    if cache.written < count:
        return f"forward of {cache.written} of {count} segments ran, segment {cache.written} of {cache.lengths} is next"
    return (
        f"all {count} forwards and {count - cache.left - cache.frozen} backwards ran, the backward of segment "
        f"{cache.next_backward} is next"
    )
