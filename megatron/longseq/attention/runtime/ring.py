"""Ring attention: run the steps that `plan_ring_attention` returns, forward and backward.

Keys and values are separate tensors, as projections and kernels make them: a range of rows is sent without a copy. The
next step's keys are in flight while a step's blocks are computed. Results are merged as they come, in the accumulation
dtype. Gradients of keys travel in the accumulation dtype, one step behind the keys.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel, accumulation_dtype
from megatron.longseq.attention.plan.ranges import TokenRanges, rows_of, size
from megatron.longseq.attention.plan.ring_schedule import KVTransfer, RingStep
from megatron.longseq.attention.runtime.comm import Message, P2PChannel, P2PWork
from megatron.longseq.attention.runtime.grad_sums import KV, GradAccumulator, Received, empty_kv
from megatron.longseq.attention.runtime.packing import take_rows
from megatron.longseq.attention.runtime.tiled import tiled_backward, tiled_forward

Saved = tuple[Tensor, KV, Tensor, Tensor]  # q, own keys and values, out, log-sum-exp

# Messages with gradients to their owners that may stay in flight: rank 0 posts this many in every step.
MAX_RETURNS_IN_FLIGHT = 2


@dataclass(frozen=True)
class RingChannels:
    """Communicators of a ring, so that keys do not wait for gradients, nor short messages for long ones.

    Attributes:
        kv, grads: messages that arrive in the next step.
        far_kv, far_grads: messages with more time to arrive: to the next window of a double ring, and to the owner.
    """

    kv: P2PChannel
    grads: P2PChannel
    far_kv: P2PChannel
    far_grads: P2PChannel


def ring_forward(
    kernel: Kernel, q: Tensor, own: KV, steps: Sequence[RingStep], channels: RingChannels, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention of this rank's queries to the keys of all ranks.

    Args:
        kernel: computes a block.
        q: [n, b, hq, d].
        own: keys and values of this rank.
        steps: see `plan_ring_attention`.
        channels: to the other ranks.
        scale: factor of the scores.

    Returns:
        out [n, b, hq, d] in the type of q, and lse [b, hq, n] in the accumulation dtype.
    """
    if _is_single_rank(steps):
        return tiled_forward(kernel, q, *own, steps[0].first, scale)
    result: tuple[Tensor, Tensor] | None = None
    for _, step, kv in _iterate_steps(own, steps, channels):
        if result is None:
            result = tiled_forward(kernel, q, *kv, step.first, scale, is_partial=True)
        if step.more:
            tiled_forward(kernel, q, *kv, step.more, scale, result=result)
        del kv
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
    """Compute the gradients of `ring_forward`.

    Args:
        kernel, steps, channels, scale: see `ring_forward`.
        saved: q, own keys and values, and the results of `ring_forward`.
        grad_out: [n, b, hq, d].

    Returns:
        dq [n, b, hq, d] in the type of q, and the gradients of the own keys and values in the accumulation dtype.
    """
    q, own, out, lse = saved
    own_grads = GradAccumulator(own[0], steps[0].grad_rows, steps[0].kv_rows)
    if _is_single_rank(steps):
        whole = tiled_backward(kernel, (q, *own, out, lse), grad_out, steps[0].first, scale, own_grads.add)
        assert whole is not None, "a rank has its own keys"
        return whole, own_grads.result()
    dq: Tensor | None = None
    transfers = _Transfers(channels.grads, channels.far_grads)
    for index, step, kv in _iterate_steps(own, steps, channels):
        grads = GradAccumulator(own[0], step.grad_rows, step.kv_rows) if index else own_grads
        dq = tiled_backward(kernel, (q, *kv, out, lse), grad_out, step.tiles, scale, grads.add, is_partial=True, dq=dq)
        del kv
        grads.add_received(transfers.wait(index))
        dtype = accumulation_dtype(q.dtype)
        transfers.post(step.grad_sends, grads.result(), step.grad_rows, step.grad_recvs, own[0], dtype)
        own_grads.add_received(transfers.wait(len(steps), but=MAX_RETURNS_IN_FLIGHT))
        del grads
    own_grads.add_received(transfers.wait(len(steps)))
    assert dq is not None, "in step 0 a rank has its own keys"
    return dq.to(q.dtype), own_grads.result()


def _is_single_rank(steps: Sequence[RingStep]) -> bool:
    """Return whether nothing is exchanged or merged: the ring has one rank."""
    return len(steps) == 1 and not steps[0].more


def _iterate_steps(own: KV, steps: Sequence[RingStep], channels: RingChannels) -> Iterator[tuple[int, RingStep, KV]]:
    """Yield (index, step, keys and values) after posting the step's messages.

    The caller must drop the keys before the next step: there are buffers for the own, the current and the next keys.
    """
    transfers = _Transfers(channels.kv, channels.far_kv)
    received: dict[int, KV] = {}
    for index, step in enumerate(steps):
        deque(transfers.wait(index), maxlen=0)
        kv = own if index == 0 else received.pop(step.source, (own[0][:0], own[1][:0]))
        for one, buffer in transfers.post(step.kv_sends, kv, step.kv_rows, step.kv_recvs, own[0], own[0].dtype):
            received[one.source] = buffer
        yield index, step, kv
        del kv
    deque(transfers.wait(len(steps)), maxlen=0)


class _Transfers:
    """Messages in flight. Both sides post them in one step and wait for them in another."""

    def __init__(self, near: P2PChannel, far: P2PChannel) -> None:
        self._near, self._far = near, far
        self._due: dict[int, list[tuple[P2PWork, list[Received]]]] = defaultdict(list)

    def post(
        self,
        sends: Sequence[KVTransfer],
        buffer: KV,
        buffer_rows: TokenRanges,
        recvs: Sequence[KVTransfer],
        like: Tensor,
        dtype: torch.dtype,
    ) -> list[tuple[KVTransfer, KV]]:
        """Start the transfers of a step.

        Args:
            sends: messages to send from `buffer`.
            buffer: keys and values, or their gradients.
            buffer_rows: rows of their source that the buffer holds.
            recvs: messages to receive.
            like: tensor with the device of the messages, and their shape except for the rows.
            dtype: type of the messages.

        Returns:
            The receives with the tensors that they fill.
        """
        filled = [(one, empty_kv(like, size(one.rows), dtype)) for one in recvs]
        for channel, is_far in ((self._near, False), (self._far, True)):
            outgoing: dict[int, list[Message]] = defaultdict(list)
            incoming: dict[int, list[Message]] = defaultdict(list)
            due: dict[int, list[Received]] = defaultdict(list)
            for one in sends:
                if _is_far(one) == is_far:
                    rows = rows_of(buffer_rows, one.rows)
                    outgoing[one.wait] += [(one.receiver, take_rows(x, rows)) for x in buffer]
            for one, kv in filled:
                if _is_far(one) == is_far:
                    incoming[one.wait] += [(one.sender, x) for x in kv]
                    due[one.wait].append((kv, one.rows))
            for wait in sorted({*outgoing, *incoming}):
                self._due[wait].append((channel.post(outgoing[wait], incoming[wait]), due[wait]))
        return filled

    def wait(self, step: int, but: int = 0) -> Iterator[Received]:
        """Wait for the messages due in a step except the latest few, and yield what arrived in the order of posting."""
        due = self._due[step]
        while len(due) > but:
            work, received = due.pop(0)
            work.wait()
            while received:
                yield received.pop(0)


def _is_far(transfer: KVTransfer) -> bool:
    return transfer.wait != transfer.post + 1
