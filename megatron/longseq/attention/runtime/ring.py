"""Ring attention: the steps of a plan (`ringplan`) carried out, forward and backward.

Keys and values are tensors of their own, as projections and kernels make them: a span of rows of each is a message
without a copy, and a block's gradients are where the sum begins. While a step's blocks are computed the next step's
keys are on their way. Results are merged as they come, in the accumulation type; no step's own result is kept.
Gradients of keys travel in the accumulation type, one step behind the keys.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.plan.ranges import TokenRanges, before, located, size
from megatron.longseq.attention.plan.ring_schedule import RingStep, Transfer
from megatron.longseq.attention.plan.tiles import TokenRange
from megatron.longseq.attention.runtime.comm import P2PChannel, Message, Work
from megatron.longseq.attention.runtime.merge import accumulation_dtype
from megatron.longseq.attention.runtime.tiled import tiled_forward, tiled_backward

KV = tuple[Tensor, Tensor]  # keys and values [rows, b, hk, d], contiguous, or the gradients of both
Saved = tuple[Tensor, KV, Tensor, Tensor]  # q, own keys and values, out, log-sum-exp
Received = tuple[KV, TokenRanges]  # keys or gradients that another rank sent, and which rows of their source's they are
HOMING = 2  # posts of gradients on their way home, which rank 0 makes in every step: more are waited for, and freed


@dataclass(frozen=True)
class RingChannels:
    """Communicators of a ring: keys must not wait behind gradients, nor a step's messages behind longer ones.

    Attributes:
        keys, grads: between steps that follow one another.
        far_keys, far_grads: messages with more than one step to arrive: to the next window of a double ring, and home.
    """

    keys: P2PChannel
    grads: P2PChannel
    far_kv: P2PChannel
    far_grads: P2PChannel


def ring_forward(
    kernel: Kernel, q: Tensor, own: KV, steps: Sequence[RingStep], channels: RingChannels, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out [n, b, hq, d] in q's type, lse [b, hq, n]) of this rank's queries over the keys of all ranks.

    Args:
        kernel: computes a block.
        q: [n, b, hq, d].
        own: this rank's keys and values.
        steps: of `ringplan.plan_ring_attention`.
        lanes: to the other ranks.
        scale: factor of the scores.
    """
    if _is_alone(steps):
        return tiled_forward(kernel, q, *own, steps[0].first, scale)
    result: tuple[Tensor, Tensor] | None = None
    for _, step, held in _iterate_steps(own, steps, channels):
        if result is None:
            result = tiled_forward(kernel, q, *held, step.first, scale, is_partial=True)
        if step.more:
            tiled_forward(kernel, q, *held, step.more, scale, result=result)
        del held
    assert result is not None, "in step 0 a rank has its own keys"
    return result[0].to(q.dtype), result[1].to(accumulation_dtype(q.dtype))


def ring_backward(
    kernel: Kernel,
    saved: Saved,
    grad_out: Tensor,
    steps: Sequence[RingStep],
    channels: RingChannels,
    scale: float,
) -> tuple[Tensor, KV]:
    """Return (dq [n, b, hq, d] in q's type, the gradients of `own` in the accumulation type).

    Args:
        kernel: computes a block.
        saved: q, own, and what `ring_forward` returned.
        grad_out: [n, b, hq, d].
        steps: those of the forward.
        lanes: to the other ranks.
        scale: factor of the scores.
    """
    q, own, out, lse = saved
    if _is_alone(steps):
        total = GradAccumulator(own[0], steps[0].grad_rows, steps[0].kv_rows)
        whole = tiled_backward(kernel, (q, *own, out, lse), grad_out, steps[0].first, scale, total.add)
        assert whole is not None, "a rank has its own keys"
        return whole, total.close()
    dq: Tensor | None = None
    post = _Transfers(channels.grads, channels.far_grads)
    mine = GradAccumulator(own[0], steps[0].grad_rows, steps[0].kv_rows)
    for index, step, held in _iterate_steps(own, steps, channels):
        total = GradAccumulator(own[0], step.grad_rows, step.kv_rows) if index else mine
        tiles = (*step.first, *step.more)
        dq = tiled_backward(kernel, (q, *held, out, lse), grad_out, tiles, scale, total.add, is_partial=True, dq=dq)
        del held
        total.take(post.arrived(index))
        post.start(step.grad_sends, total.close(), step.grad_rows, step.grad_recvs, own[0], accumulation_dtype(q.dtype))
        mine.take(post.arrived(len(steps), but=HOMING))
        del total
    mine.take(post.arrived(len(steps)))
    assert dq is not None, "in step 0 a rank has its own keys"
    return dq.to(q.dtype), mine.close()


def _is_alone(steps: Sequence[RingStep]) -> bool:
    """Return whether nothing is exchanged or merged: a ring of one rank."""
    return len(steps) == 1 and not steps[0].more


def _iterate_steps(own: KV, steps: Sequence[RingStep], channels: RingChannels) -> Iterator[tuple[int, RingStep, KV]]:
    """Yield each step with the keys that lie here in it, once the messages of the step are on their way.

    Who takes the keys forgets them before the next step: own, held and coming are the three buffers that there are.
    """
    post = _Transfers(channels.keys, channels.far_kv)
    waiting: dict[int, KV] = {}
    for index, step in enumerate(steps):
        deque(post.arrived(index), maxlen=0)
        held = own if index == 0 else waiting.pop(step.source, (own[0][:0], own[1][:0]))
        for move, came in post.start(step.kv_sends, held, step.kv_rows, step.kv_recvs, own[0], own[0].dtype):
            waiting[move.source] = came
        yield index, step, held
        del held
    deque(post.arrived(len(steps)), maxlen=0)


class _Transfers:
    """Transfers under way: started in one step, waited for in another, on both sides."""

    def __init__(self, near: P2PChannel, far: P2PChannel) -> None:
        self._near, self._far = near, far
        self._due: dict[int, list[tuple[Work, list[Received]]]] = defaultdict(list)

    def start(
        self,
        out: Sequence[Transfer],
        buffer: KV,
        held: TokenRanges,
        into: Sequence[Transfer],
        like: Tensor,
        dtype: torch.dtype,
    ) -> list[tuple[Transfer, KV]]:
        """Start a step's transfers; return the receives with the tensors that they fill.

        Args:
            out: sent from `buffer`, whose rows are `held` of their source's.
            buffer: keys and values, or their gradients.
            held: see `out`.
            into: received.
            like: gives the shape but for the rows, and the device.
            dtype: of the messages.
        """
        filled = [(move, _pair(like, size(move.rows), dtype)) for move in into]
        for lane, is_far in ((self._near, False), (self._far, True)):
            sends: dict[int, list[Message]] = defaultdict(list)
            receives: dict[int, list[Message]] = defaultdict(list)
            coming: dict[int, list[Received]] = defaultdict(list)
            for move in out:
                if _is_far(move) == is_far:
                    rows = located(held, move.rows)
                    sends[move.wait] += [(move.receiver, _rows(x, rows)) for x in buffer]
            for move, pair in filled:
                if _is_far(move) == is_far:
                    receives[move.wait] += [(move.sender, x) for x in pair]
                    coming[move.wait].append((pair, move.rows))
            for wait in sorted({*sends, *receives}):
                self._due[wait].append((lane.post(sends[wait], receives[wait]), coming[wait]))
        return filled

    def arrived(self, step: int, but: int = 0) -> Iterator[Received]:
        """Wait for what is due in a step, but not for the latest few posts; yield what came, in the order of posts."""
        due = self._due[step]
        while len(due) > but:
            pending, coming = due.pop(0)
            pending.wait()
            while coming:
                yield coming.pop(0)


def _is_far(move: Transfer) -> bool:
    return move.wait != move.post + 1


def _pair(like: Tensor, rows: int, dtype: torch.dtype) -> KV:
    """Return room for some rows of keys and of values."""
    first, second = (like.new_empty(rows, *like.shape[1:], dtype=dtype) for _ in range(2))
    return first, second


def _rows(buffer: Tensor, rows: TokenRanges) -> Tensor:
    """Return some rows of a buffer as one contiguous tensor; one span is no copy."""
    parts = [buffer[span.slice()] for span in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class GradAccumulator:
    """The sum of the gradients of some rows of a source's keys and values.

    Args:
        like: keys, [..., b, hk, d]: gives shape, type and device.
        summed: which of the source's rows.
        held: rows of the source that the blocks' keys count through.
    """

    def __init__(self, like: Tensor, summed: TokenRanges, held: TokenRanges) -> None:
        self._like, self._summed, self._held = like, summed, held
        self._sum: KV | None = None

    def add(self, batch: TokenRange, keys: TokenRange, dk: Tensor, dv: Tensor) -> None:
        """Add a block's gradients; `keys` counts through what is held. They may become the sum, and change later."""
        rows = self._rows(keys)
        if self._sum is None and rows.size == size(self._summed) and batch.size == self._like.shape[1]:
            dtype = accumulation_dtype(self._like.dtype)
            self._sum = dk.to(dtype).contiguous(), dv.to(dtype).contiguous()
            return
        for whole, grad in zip(self.close(), (dk, dv), strict=True):
            whole[rows.slice(), batch.slice()].add_(grad)

    def take(self, sums: Iterable[Received]) -> None:
        """Add what other ranks have summed of some of the source's rows."""
        for pair, rows in sums:
            begin = 0
            for span in located(self._summed, rows):
                for whole, came in zip(self.close(), pair, strict=True):
                    whole[span.slice()].add_(came[begin : begin + span.size])
                begin += span.size

    def close(self) -> KV:
        """Return the sum."""
        if self._sum is None:
            first, second = _pair(self._like, size(self._summed), accumulation_dtype(self._like.dtype))
            self._sum = first.zero_(), second.zero_()
        return self._sum

    def _rows(self, keys: TokenRange) -> TokenRange:
        """Turn a span of what is held into one of what is summed."""
        passed = 0
        for span in self._held:
            if keys.begin < passed + span.size:
                begin = before(self._summed, span.begin + keys.begin - passed)
                return TokenRange(begin, begin + keys.size)
            passed += span.size
        raise AssertionError(f"keys {tuple(keys)} lie beyond the {passed} rows that are held")
