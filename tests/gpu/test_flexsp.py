"""FlexSP on a GPU: the host prepares micro-batches while the GPU computes."""

import time

import numpy
import pytest
import torch

from megatron.longseq.attention.runtime.document_attention import single_rank_strategy
from megatron.longseq.flexsp.runtime.clock import StepClock
from megatron.longseq.flexsp.runtime.documents import Document
from megatron.longseq.flexsp.runtime.microbatch import GroupBatch, pack_documents

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LONG = 1_000_000_000  # cycles: some 500 ms
TOKENS = 100_000


def packed(device: str) -> GroupBatch:
    row = numpy.arange(TOKENS)
    documents = [Document(row, row + 1, numpy.ones(TOKENS, numpy.float32)) for _ in range(2)]
    return pack_documents(documents, single_rank_strategy(), 0, 1, torch.device(device))


def test_the_host_packs_documents_while_the_gpu_computes() -> None:
    packed("cuda")  # the first call allocates pinned memory
    torch.cuda.synchronize()
    begin, clock = time.perf_counter(), StepClock()
    clock.begin()
    torch.cuda._sleep(LONG)
    batch = packed("cuda")
    clock.end()
    waited = time.perf_counter() - begin
    torch.cuda.synchronize()
    taken = time.perf_counter() - begin
    assert waited < taken / 2, "the host does not wait"
    assert taken / 2 < clock.pass_seconds() <= taken, "the clock measures the GPU's time"
    expected = packed("cpu")
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(getattr(batch, name).cpu(), getattr(expected, name))
