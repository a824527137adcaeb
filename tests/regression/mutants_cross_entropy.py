"""Planted errors of the chunked cross entropy; see `mutants.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tests.regression.planted import Planted, wrapped


@contextmanager
def lost_last_chunk() -> Iterator[Planted]:
    """Lose the gradients of the last chunk, which is shorter than the others. The losses are correct."""
    from megatron.longseq.cross_entropy.runtime import function

    planted, longest = Planted(), 0

    def logit_grad(original: Any, logits: Tensor, *values: Tensor) -> Tensor:
        nonlocal longest
        longest = max(longest, logits.shape[0])
        gradient: Tensor = original(logits, *values)
        if gradient.shape[0] < longest:
            planted.times += 1
            gradient.zero_()
        return gradient

    with wrapped(function, "_logit_grad", logit_grad):
        yield planted


@contextmanager
def shards_out_of_order() -> Iterator[Planted]:
    """Pair the hidden states of one sequence-parallel shard with the labels of another one."""
    from megatron.longseq.cross_entropy.runtime.function import ChunkedLossCall

    planted = Planted()

    def inputs(original: Any, call: Any, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part, total in original(call, rows):
            planted.times += call.shards > 1
            yield part, total.roll(total.shape[0] // call.shards, 0) if call.shards > 1 else total

    with wrapped(ChunkedLossCall, "inputs", inputs):
        yield planted


ALL = (lost_last_chunk, shards_out_of_order)
