"""Keys and values of earlier segments, and the gradients that later segments leave them, on one pipeline stage.

Each segment's lie in tensors of their own: they come with its forward and go with its backward, and so do the
gradients. There is no pool: memory that a segment gives back serves whatever is allocated next, of any layer, virtual
stage, training or evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron.longseq.attention.plan.tiles import TokenRange
from megatron.longseq.attention.runtime.merge import accumulation_dtype
from megatron.longseq.segment import Segment


class SegmentOrderError(RuntimeError):
    """A segment came out of order, or without being announced."""


@dataclass(slots=True)
class LayerCache:
    """What one layer keeps of one micro-batch.

    Attributes:
        lengths: rows of every segment.
        parts: of every segment that was written and whose backward is to come, its keys and values [n, ...].
        left: segments whose backward is to come.
        frozen: the first segments, in which nothing needs a gradient: no backward of theirs will come.
        grads: by segment, the sum of what later segments left it, in the accumulation type.
        written: segments whose forward has run.
        counted: bytes that the store has counted of it.
    """

    lengths: tuple[int, ...]
    parts: list[tuple[Tensor, ...]] = field(default_factory=list)
    left: int = field(init=False)
    frozen: int = 0
    grads: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    written: int = 0
    counted: int = 0

    def __post_init__(self) -> None:
        self.left = len(self.lengths)

    @property
    def next_backward(self) -> int:
        """The segment whose backward is next, once all forwards have run."""
        return self.frozen + self.left - 1

    def seen(self, segment: Segment) -> tuple[Tensor, ...]:
        """Return all keys and values up to a segment's end, each as one tensor: a copy, unless there is one part."""
        parts = self.parts[: segment.index + 1]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    def add(self, batch: TokenRange, keys: TokenRange, grads: Sequence[Tensor]) -> None:
        """Add gradients of some sequences' keys (and values) to what their segments are left."""
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

    def bytes(self) -> int:
        """Return what its tensors take."""
        held = (*self.parts, *self.grads.values())
        return sum(x.nbytes for tensors in held for x in tensors)


class SegmentGradAccumulator:
    """Sums a segment's dk and dv over its blocks: those of earlier segments in the slot, the segment's own aside."""

    def __init__(self, slot: LayerCache, segment: Segment) -> None:
        self._slot, self._segment = slot, segment
        self._own: tuple[Tensor, ...] | None = slot.grads.get(segment.index)

    def __call__(self, batch: TokenRange, keys: TokenRange, dk: Tensor, dv: Tensor) -> None:
        """Take a block's gradients [keys, sequences, ...]."""
        border = self._segment.begin
        before = max(0, min(border, keys.end) - keys.begin)
        if before:
            self._slot.add(batch, TokenRange(keys.begin, keys.begin + before), (dk[:before], dv[:before]))
        if before < keys.size:
            rows = TokenRange(keys.begin + before - border, keys.end - border)
            self._add_own(batch, rows, (dk[before:], dv[before:]))

    def own(self) -> tuple[Tensor, ...]:
        """Return the segment's own dk and dv: its blocks' and what later segments left, not rounded yet."""
        if self._own is None:
            self._own = self._zeros()
        return self._own

    def _add_own(self, batch: TokenRange, rows: TokenRange, grads: tuple[Tensor, ...]) -> None:
        part = self._slot.parts[self._segment.index]
        if self._own is None and all(x.shape == grad.shape for x, grad in zip(part, grads, strict=True)):
            self._own = tuple(without_base(grad) for grad in grads)  # added to further, it is taken over below
            return
        if self._own is None:
            self._own = self._zeros()
        wide = tuple(x if x.dtype == accumulation_dtype(x.dtype) else x.to(accumulation_dtype(x.dtype)) for x in self._own)
        for total, grad in zip(wide, grads, strict=True):
            total[rows.slice(), batch.slice()].add_(grad)
        self._own = wide

    def _zeros(self) -> tuple[Tensor, ...]:
        part = self._slot.parts[self._segment.index]
        return tuple(torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in part)


class SegmentKVCache:
    """Slots of (layer, micro-batch), from the forward of the first segment to its backward (in a forward-only pass, to
    the forward of the last segment).

    Attributes:
        current: the segment being computed. The executor sets it before every forward *and before every backward*, in
            which recomputation runs forwards again; autograd may run them in threads of its own, so it is a plain
            attribute.
        peak_bytes: most bytes ever held in slots at once.
    """

    def __init__(self) -> None:
        self.current: Segment | None = None
        self.peak_bytes = 0
        self._slots: dict[tuple[int, int], LayerCache] = {}
        self._bytes = 0

    def current_segment(self, layer: int) -> Segment:
        """Return the current segment.

        Raises:
            PrefixOrderError: none was announced.
        """
        if self.current is None:
            raise SegmentOrderError(
                f"layer {layer}: attention runs, but no segment is current; set store.current before every forward and "
                "every backward of a segment"
            )
        return self.current

    def write(self, layer: int, segment: Segment, *tensors: Tensor) -> LayerCache:
        """Write a segment's keys and values [n, ...]; again and alike where a backward recomputes them.

        Raises:
            PrefixOrderError: not this segment's turn.
            ValueError: shapes that do not fit the segment or the micro-batch.
        """
        slot = self._slots.get((layer, segment.microbatch)) or self._open(layer, segment)
        recomputed = slot.written == segment.count and segment.index == slot.next_backward and not segment.forward_only
        if segment.lengths != slot.lengths or not (segment.index == slot.written or recomputed):
            raise SegmentOrderError(f"layer {layer}, {segment}: forward out of order; {_state(slot)}")
        like = slot.parts[0] if slot.parts else tensors
        for first, new in zip(like, tensors, strict=True):
            expected = (segment.tokens, *first.shape[1:])
            if new.shape != expected or new.dtype != first.dtype:
                raise ValueError(
                    f"layer {layer}, {segment}: keys or values are {new.dtype} {tuple(new.shape)}, expected "
                    f"{first.dtype} {expected}: {segment.tokens} tokens of the segment's {segment.lengths}"
                )
        if not recomputed:
            slot.parts.append(tuple(without_base(x.detach()).contiguous() for x in tensors))
            slot.written += 1
            self.count(slot)
        return slot

    def read(self, layer: int, segment: Segment) -> LayerCache:
        """Return the slot for the backward of a segment.

        Raises:
            PrefixOrderError: not this segment's turn, or another segment is current.
        """
        slot = self._slots.get((layer, segment.microbatch))
        if slot is None:
            raise SegmentOrderError(f"layer {layer}, {segment}: backward, but nothing is kept of this micro-batch")
        current = self.current_segment(layer)
        if (current.microbatch, current.index) != (segment.microbatch, segment.index):
            raise SegmentOrderError(f"layer {layer}, {segment}: backward, but the current segment is {self.current}")
        if slot.written != segment.count or segment.index != slot.next_backward:
            raise SegmentOrderError(f"layer {layer}, {segment}: backward out of order; {_state(slot)}")
        return slot

    def awaits(self, layer: int, microbatch: int) -> bool:
        """Return whether keys of this micro-batch are kept that may need a gradient."""
        slot = self._slots.get((layer, microbatch))
        return slot is not None and slot.written > slot.frozen

    def close(self, layer: int, segment: Segment) -> None:
        """Count a backward as done and free the segment's part (where no backward will come, count a forward, and free
        all after the last).
        """
        slot = self._slots[layer, segment.microbatch]
        slot.left -= 1
        if segment.forward_only:
            slot.frozen += 1
        else:
            del slot.parts[segment.index]
            slot.grads.pop(segment.index, None)
        self.count(slot)
        if slot.left == 0:
            self._free(layer, segment.microbatch)

    def count(self, slot: LayerCache) -> None:
        """Count what a slot holds now."""
        held = slot.bytes()
        self._bytes += held - slot.counted
        slot.counted = held
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def leave(self, microbatch: int) -> None:
        """Free what no backward has asked for, when a micro-batch is done: layers whose output needed no gradient."""
        for layer, mb in list(self._slots):
            slot = self._slots[layer, mb]
            if mb == microbatch and slot.written == slot.left == len(slot.lengths):
                self._free(layer, mb)

    def bytes(self) -> int:
        """Return the bytes held in slots."""
        return self._bytes

    def reset_peak(self) -> None:
        """Count the peak from now on."""
        self.peak_bytes = self.bytes()

    def assert_empty(self) -> None:
        """Check, at the end of a step, that every segment came back.

        Raises:
            PrefixOrderError: what is left, by layer and micro-batch.
        """
        if self._slots:
            left = [f"layer {layer}, micro-batch {mb}: {_state(slot)}" for (layer, mb), slot in self._slots.items()]
            shown = "; ".join(left[:8]) + (f"; and {len(left) - 8} more" if len(left) > 8 else "")
            raise SegmentOrderError(f"keys and values of earlier segments are left at the end of the step: {shown}")

    def reset(self) -> None:
        """Forget every slot, after a step that did not end."""
        for layer, microbatch in list(self._slots):
            self._free(layer, microbatch)
        self.current = None

    def _open(self, layer: int, segment: Segment) -> LayerCache:
        if segment.index:
            raise SegmentOrderError(f"layer {layer}, {segment}: forward, but segment 0 of this micro-batch never came")
        slot = self._slots[layer, segment.microbatch] = LayerCache(segment.lengths)
        return slot

    def _free(self, layer: int, microbatch: int) -> None:
        self._bytes -= self._slots.pop((layer, microbatch)).counted


def may_need_backward(*inputs: Tensor) -> bool:
    """Return whether a backward of these inputs may follow: outside of autograd, as in the first forward of what is
    computed again, that is not known.
    """
    return not torch.is_grad_enabled() or any(x.requires_grad for x in inputs)


def differentiable(
    cache: SegmentKVCache | None, layer: int, segment: Segment, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Segment]:
    """Return the queries and the segment of an attention, made such that autograd runs its backward if one is needed.

    Keys of earlier segments may need a gradient where nothing of this segment does: a script may train the first tokens
    of a sequence alone (a prompt). Autograd does not see those keys, so the queries then stand for them. Where neither
    needs a gradient the segment is forward-only.
    """
    if segment.forward_only or may_need_backward(q, k, v):
        return q, segment
    if cache is not None and cache.awaits(layer, segment.microbatch):
        return q.detach().requires_grad_(), segment
    return q, replace(segment, forward_only=True)


def without_base(x: Tensor) -> Tensor:
    """Return a tensor that keeps no larger storage alive than its own: a slice of a fused projection is copied."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def _state(slot: LayerCache) -> str:
    """Say how far a slot is."""
    count = len(slot.lengths)
    if slot.written < count:
        return f"forward of {slot.written} of {count} segments ran, segment {slot.written} of {slot.lengths} is next"
    return (
        f"all {count} forwards and {count - slot.left - slot.frozen} backwards ran, the backward of segment "
        f"{slot.next_backward} is next"
    )
