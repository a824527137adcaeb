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
        lengths: tokens of every segment.
        keys, values: [N, b, hk, d], written up to the end of segment `written` - 1.
        written: segments whose forward has run.
        left: segments whose backward is to come.
        grads: dk and dv of [0, N - last segment), in the accumulation type, from the last segment's backward on.
        untouched: nothing was added to `grads` yet, their content is arbitrary.
    """

    lengths: tuple[int, ...]
    keys: Tensor
    values: Tensor
    written: int = 0
    left: int = field(init=False)
    grads: tuple[Tensor, Tensor] | None = None
    untouched: bool = True

    def __post_init__(self) -> None:
        self.left = len(self.lengths)

    def buffers(self) -> tuple[Tensor, ...]:
        """Return every buffer of the slot."""
        return (self.keys, self.values, *(self.grads or ()))


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

    def write(self, layer: int, segment: Segment, k: Tensor, v: Tensor) -> Slot:
        """Write a segment's keys and values [n, b, hk, d]; again and alike where a backward recomputes them.

        Raises:
            PrefixOrderError: not this segment's turn.
            ValueError: shapes that do not fit the segment or the micro-batch.
        """
        slot = self._slots.get((layer, segment.microbatch)) or self._open(layer, segment, k, v)
        recomputed = slot.written == segment.count and segment.index == slot.left - 1 and not segment.forward_only
        if segment.lengths != slot.lengths or not (segment.index == slot.written or recomputed):
            raise PrefixOrderError(f"layer {layer}, {segment}: forward out of order; {_state(slot)}")
        here = slice(segment.begin, segment.end)
        for name, buffer, new in (("keys", slot.keys, k), ("values", slot.values, v)):
            if new.shape != buffer[here].shape or new.dtype != buffer.dtype:
                raise ValueError(
                    f"layer {layer}, {segment}: {name} are {new.dtype} {tuple(new.shape)}, expected {buffer.dtype} "
                    f"{tuple(buffer[here].shape)}: {segment.tokens} tokens of the segment's {segment.lengths}"
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
        if self.announced(layer) != segment:
            raise PrefixOrderError(f"layer {layer}, {segment}: backward, but the current segment is {self.current}")
        if slot.written != segment.count or segment.index != slot.left - 1:
            raise PrefixOrderError(f"layer {layer}, {segment}: backward out of order; {_state(slot)}")
        return slot

    def open_grads(self, slot: Slot) -> None:
        """Take the accumulators of the earlier segments' gradients; none where the sequence is one segment."""
        tokens = sum(slot.lengths[:-1])
        if tokens:
            slot.grads = tuple(  # type: ignore[assignment]
                self._pool.take(torch.Size((tokens, *x.shape[1:])), accumulation(x.dtype), x.device)
                for x in (slot.keys, slot.values)
            )
            self._count()

    def close(self, layer: int, segment: Segment) -> None:
        """Count a backward as done (in a forward-only pass a forward); free the slot after the last."""
        slot = self._slots[layer, segment.microbatch]
        slot.left -= 1
        if slot.left == 0:
            self._free(layer, segment.microbatch)

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

    def _open(self, layer: int, segment: Segment, k: Tensor, v: Tensor) -> Slot:
        if segment.index:
            raise PrefixOrderError(f"layer {layer}, {segment}: forward, but segment 0 of this micro-batch never came")
        keys, values = (self._pool.take(torch.Size((segment.total, *x.shape[1:])), x.dtype, x.device) for x in (k, v))
        slot = self._slots[layer, segment.microbatch] = Slot(segment.lengths, keys, values)
        self._count()
        return slot

    def _free(self, layer: int, microbatch: int) -> None:
        for buffer in self._slots.pop((layer, microbatch)).buffers():
            self._pool.give(buffer)

    def _count(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.bytes())
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes())


def _state(slot: Slot) -> str:
    """Say how far a slot is."""
    count = len(slot.lengths)
    if slot.written < count:
        return f"forward of {slot.written} of {count} segments ran, segment {slot.written} of {slot.lengths} is next"
    return (
        f"all {count} forwards and {count - slot.left} backwards ran, the backward of segment {slot.left - 1} is next"
    )
