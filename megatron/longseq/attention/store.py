"""Keys and values of earlier segments, and the gradients that later segments leave them, on one pipeline stage."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.longseq.attention.merge import accumulation
from megatron.longseq.attention.segment import Segment

_Kind = tuple[torch.Size, torch.dtype, torch.device]


class PrefixOrderError(RuntimeError):
    """A segment came out of order, or without being announced."""


class Pool:
    """Buffers that are given back and taken again: no allocation once every shape has been seen."""

    def __init__(self) -> None:
        self._free: dict[_Kind, list[Tensor]] = defaultdict(list)
        self.used_bytes = 0
        self.free_bytes = 0

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer with any content."""
        free = self._free[shape, dtype, device]
        if free:
            buffer = free.pop()
            self.free_bytes -= buffer.nbytes
        else:
            buffer = torch.empty(shape, dtype=dtype, device=device)
        self.used_bytes += buffer.nbytes
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._free[buffer.shape, buffer.dtype, buffer.device].append(buffer)
        self.used_bytes -= buffer.nbytes
        self.free_bytes += buffer.nbytes

    def trim(self) -> None:
        """Let go of the buffers that nobody uses."""
        self._free.clear()
        self.free_bytes = 0


@dataclass(slots=True)
class Slot:
    """What one layer keeps of one micro-batch.

    Attributes:
        lengths: rows of every segment.
        tensors: [N, ...], written up to the end of segment `written` - 1: keys and values, apart or together.
        written: segments whose forward has run.
        left: segments whose backward is to come.
        grads: of every tensor's first rows, in the accumulation type, from the last segment's backward on.
        untouched: nothing was added to `grads` yet, their content is arbitrary.
    """

    lengths: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    written: int = 0
    left: int = field(init=False)
    grads: tuple[Tensor, ...] | None = None
    untouched: bool = True

    def __post_init__(self) -> None:
        self.left = len(self.lengths)

    def buffers(self) -> tuple[Tensor, ...]:
        """Return every buffer of the slot."""
        return (*self.tensors, *(self.grads or ()))


class PrefixStore:
    """Slots of (layer, micro-batch), from the forward of the first segment to its backward (in a forward-only pass, to
    the forward of the last segment).

    Attributes:
        current: the segment being computed. The executor sets it before every forward *and before every backward*, in
            which recomputation runs forwards again; autograd may run them in threads of its own, so it is a plain
            attribute.
        peak_bytes: most bytes ever held in slots at once.
        peak_allocated_bytes: most bytes ever held in slots and in the pool behind them.
    """

    def __init__(self) -> None:
        self.current: Segment | None = None
        self.peak_bytes = 0
        self.peak_allocated_bytes = 0
        self._slots: dict[tuple[int, int], Slot] = {}
        self._pool = Pool()

    def announced(self, layer: int) -> Segment:
        """Return the current segment.

        Raises:
            PrefixOrderError: none was announced.
        """
        if self.current is None:
            raise PrefixOrderError(
                f"layer {layer}: attention runs, but no segment is current; set store.current before every forward and "
                "every backward of a segment"
            )
        return self.current

    def write(self, layer: int, segment: Segment, *tensors: Tensor) -> Slot:
        """Write a segment's keys and values [n, ...]; again and alike where a backward recomputes them.

        Raises:
            PrefixOrderError: not this segment's turn.
            ValueError: shapes that do not fit the segment or the micro-batch.
        """
        slot = self._slots.get((layer, segment.microbatch)) or self._open(layer, segment, tensors)
        recomputed = slot.written == segment.count and segment.index == slot.left - 1 and not segment.forward_only
        if segment.lengths != slot.lengths or not (segment.index == slot.written or recomputed):
            raise PrefixOrderError(f"layer {layer}, {segment}: forward out of order; {_state(slot)}")
        here = slice(segment.begin, segment.end)
        for buffer, new in zip(slot.tensors, tensors, strict=True):
            if new.shape != buffer[here].shape or new.dtype != buffer.dtype:
                raise ValueError(
                    f"layer {layer}, {segment}: keys or values are {new.dtype} {tuple(new.shape)}, expected "
                    f"{buffer.dtype} {tuple(buffer[here].shape)}: {segment.tokens} tokens of the segment's "
                    f"{segment.lengths}"
                )
            buffer[here].copy_(new)
        slot.written = max(slot.written, segment.index + 1)
        return slot

    def read(self, layer: int, segment: Segment) -> Slot:
        """Return the slot for the backward of a segment.

        Raises:
            PrefixOrderError: not this segment's turn, or another segment is current.
        """
        slot = self._slots.get((layer, segment.microbatch))
        if slot is None:
            raise PrefixOrderError(f"layer {layer}, {segment}: backward, but nothing is kept of this micro-batch")
        current = self.announced(layer)
        if (current.microbatch, current.index) != (segment.microbatch, segment.index):
            raise PrefixOrderError(f"layer {layer}, {segment}: backward, but the current segment is {self.current}")
        if slot.written != segment.count or segment.index != slot.left - 1:
            raise PrefixOrderError(f"layer {layer}, {segment}: backward out of order; {_state(slot)}")
        return slot

    def open_grads(self, slot: Slot, rows: int) -> None:
        """Take the accumulators of the first rows' gradients."""
        if rows:
            slot.grads = tuple(
                self._pool.take(torch.Size((rows, *x.shape[1:])), accumulation(x.dtype), x.device) for x in slot.tensors
            )
            self._count()

    def close(self, layer: int, segment: Segment) -> None:
        """Count a backward as done (in a forward-only pass a forward); free the slot after the last."""
        slot = self._slots[layer, segment.microbatch]
        slot.left -= 1
        if slot.left == 0:
            self._free(layer, segment.microbatch)

    def leave(self, microbatch: int) -> None:
        """Free what no backward has asked for, when a micro-batch is done: layers whose output needed no gradient."""
        for layer, mb in list(self._slots):
            slot = self._slots[layer, mb]
            if mb == microbatch and slot.written == slot.left == len(slot.lengths):
                self._free(layer, mb)

    def bytes(self) -> int:
        """Return the bytes held in slots."""
        return self._pool.used_bytes

    def allocated_bytes(self) -> int:
        """Return the bytes held in slots and kept for the next ones."""
        return self._pool.used_bytes + self._pool.free_bytes

    def reset_peak(self) -> None:
        """Count peaks from now on."""
        self.peak_bytes, self.peak_allocated_bytes = self.bytes(), self.allocated_bytes()

    def trim(self) -> None:
        """Let go of the buffers that no slot uses."""
        self._pool.trim()

    def assert_empty(self) -> None:
        """Check, at the end of a step, that every segment came back.

        Raises:
            PrefixOrderError: what is left, by layer and micro-batch.
        """
        if self._slots:
            left = [f"layer {layer}, micro-batch {mb}: {_state(slot)}" for (layer, mb), slot in self._slots.items()]
            shown = "; ".join(left[:8]) + (f"; and {len(left) - 8} more" if len(left) > 8 else "")
            raise PrefixOrderError(f"keys and values of earlier segments are left at the end of the step: {shown}")

    def reset(self) -> None:
        """Forget every slot, after a step that did not end."""
        for layer, microbatch in list(self._slots):
            self._free(layer, microbatch)
        self.current = None

    def _open(self, layer: int, segment: Segment, tensors: tuple[Tensor, ...]) -> Slot:
        if segment.index:
            raise PrefixOrderError(f"layer {layer}, {segment}: forward, but segment 0 of this micro-batch never came")
        whole = tuple(self._pool.take(torch.Size((segment.total, *x.shape[1:])), x.dtype, x.device) for x in tensors)
        slot = self._slots[layer, segment.microbatch] = Slot(segment.lengths, whole)
        self._count()
        return slot

    def _free(self, layer: int, microbatch: int) -> None:
        for buffer in self._slots.pop((layer, microbatch)).buffers():
            self._pool.give(buffer)

    def _count(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.bytes())
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes())


def awaits_backward(*inputs: Tensor) -> bool:
    """Return whether a backward of these inputs may follow: outside of autograd, as in the first forward of what is
    computed again, that is not known.
    """
    return not torch.is_grad_enabled() or any(x.requires_grad for x in inputs)


def alone(x: Tensor) -> Tensor:
    """Return a tensor that keeps no larger storage alive than its own: a slice of a fused projection is copied."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def _state(slot: Slot) -> str:
    """Say how far a slot is."""
    count = len(slot.lengths)
    if slot.written < count:
        return f"forward of {slot.written} of {count} segments ran, segment {slot.written} of {slot.lengths} is next"
    return (
        f"all {count} forwards and {count - slot.left} backwards ran, the backward of segment {slot.left - 1} is next"
    )
