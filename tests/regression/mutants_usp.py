"""Planted errors of attention over context-parallel ranks; see `mutants.py`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.regression.planted import Planted, wrapped


@contextmanager
def zigzag_off_by_one() -> Iterator[Planted]:
    """Use the positions of the neighbour on every rank of a ring."""
    from megatron.longseq.attention.plan.layout import Layout

    planted = Planted()

    def ring_positions(original: Any, self: Any, ring: int, segment: int) -> Any:
        planted.times += self.mesh.ring > 1
        return original(self, (ring + 1) % self.mesh.ring, segment)

    with wrapped(Layout, "ring_positions", ring_positions):
        yield planted


@contextmanager
def unflipped_arrivals() -> Iterator[Planted]:
    """Leave the second halves in rank order after the all-to-all, so that the zigzag is in the wrong order."""
    from megatron.longseq.attention.plan.layout import Layout

    planted = Planted()

    def received_rows(original: Any, self: Any, segments: range) -> Any:
        planted.times += self.mesh.ulysses > 1
        rows = sorted({arrival.rows for arrival in original(self, segments)})
        arrival_of = type(original(self, segments)[0])
        return tuple(arrival_of(source, span) for span in rows for source in range(self.mesh.ulysses))

    with wrapped(Layout, "received_rows", received_rows):
        yield planted


@contextmanager
def rope_of_local_positions() -> Iterator[Planted]:
    """Start the rotary positions of every rank at 0."""
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    planted = Planted()

    def on_this_rank(_: Any, pos_emb: Tensor, seq_dim: int, cp_group: Any, *__: Any, **___: Any) -> Tensor:
        planted.times += 1
        return pos_emb.narrow(seq_dim, 0, pos_emb.shape[seq_dim] // cp_group.size())

    with wrapped(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", on_this_rank):
        yield planted


@contextmanager
def loss_divided_by_ranks() -> Iterator[Planted]:
    """Divide the loss by the number of context-parallel ranks a second time.

    The reported loss is correct, and Adam is invariant to the scale.
    """
    from patches.usp import loss

    planted = Planted()

    def counted(original: Any, loss_func: Callable[..., Any]) -> Callable[..., Any]:
        inner = original(loss_func)

        def divided(*args: Any, **kwargs: Any) -> Any:
            from megatron.core import parallel_state

            planted.times += 1
            total, *rest = inner(*args, **kwargs)
            return total / parallel_state.get_context_parallel_world_size(), *rest

        return divided

    with wrapped(loss, "_counted", counted):
        yield planted


@contextmanager
def loss_over_own_tokens() -> Iterator[Planted]:
    """Divide a rank's loss by the valid tokens of its own part of the sequence. The reported loss is correct."""
    from patches.usp import loss

    planted = Planted()

    def counted(_: Any, loss_func: Callable[..., Any]) -> Callable[..., Any]:
        planted.times += 1
        return loss_func

    with wrapped(loss, "_counted", counted):
        yield planted


@contextmanager
def replicas_not_summed() -> Iterator[Planted]:
    """Keep only the first rank's gradients of a key head that several ranks hold."""
    from megatron.longseq.attention.runtime.ulysses import Ulysses

    planted = Planted()

    def summed(original: Any, self: Any, grads: Tensor) -> Tensor:
        ranks = self.ranks // self.heads.kv
        if ranks > 1:
            planted.times += 1
            grads = grads.clone()
            grads[torch.arange(len(grads)) % ranks != 0] = 0
        return original(self, grads)  # type: ignore[no-any-return]

    with wrapped(Ulysses, "_sum_replicas", summed):
        yield planted


@contextmanager
def lost_last_hop() -> Iterator[Planted]:
    """Drop the gradients of a rank's own keys that arrive after the last step of a ring."""
    from megatron.longseq.attention.runtime import ring
    from megatron.longseq.attention.runtime import strategies as strategy

    planted, steps = Planted(), 0

    def ring_backward(original: Any, kernel: Any, saved: Any, grad: Any, plan: Any, *rest: Any) -> Any:
        nonlocal steps
        steps = len(plan)
        return original(kernel, saved, grad, plan, *rest)

    def wait(original: Any, self: Any, step: int, *rest: Any, **kw: Any) -> Any:
        came = list(original(self, step, *rest, **kw))
        if not came or step != steps:
            return came
        planted.times += 1
        return []

    with wrapped(strategy, "ring_backward", ring_backward), wrapped(ring._Transfers, "wait", wait):
        yield planted


@contextmanager
def stale_keys() -> Iterator[Planted]:
    """Compute a ring step with the keys of the previous step, as if its message was not waited for."""
    from megatron.longseq.attention.runtime import ring

    planted = Planted()

    def keys_round(original: Any, own: tuple[Tensor, Tensor], *rest: Any) -> Iterator[Any]:
        for index, step, held in original(own, *rest):
            planted.times += index > 0
            yield index, step, tuple(mine[: came.shape[0]] for mine, came in zip(own, held, strict=True))

    with wrapped(ring, "_iterate_steps", keys_round):
        yield planted


@contextmanager
def lost_segment_gradient() -> Iterator[Planted]:
    """Drop the gradients that a segment adds to keys of earlier segments, with context parallelism."""
    from megatron.longseq.attention.runtime import function as context

    planted = Planted()

    def with_cache(original: Any, call: Any, cache: Any, *rest: Any) -> Any:
        rows = context._cache_segment(call)
        slot = cache.read(call.layer, rows)
        before = {index: grads[0].clone() for index, grads in slot.grads.items()}
        result = original(call, cache, *rest)
        for index, (total, *_) in slot.grads.items():
            planted.times += 1
            total.copy_(before.get(index, torch.zeros_like(total)))
        return result

    with wrapped(context, "_with_cache", with_cache):
        yield planted


ALL = (
    zigzag_off_by_one,
    unflipped_arrivals,
    rope_of_local_positions,
    loss_divided_by_ranks,
    loss_over_own_tokens,
    replicas_not_summed,
    lost_last_hop,
    stale_keys,
    lost_segment_gradient,
)
