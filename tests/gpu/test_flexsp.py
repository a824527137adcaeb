"""FlexSP on a GPU: the host prepares micro-batches while the GPU computes."""

import os
import time
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.distributed as dist

from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.runtime.document_attention import single_rank_strategy
from megatron.longseq.flexsp.runtime.clock import StepClock
from megatron.longseq.flexsp.runtime.documents import Document
from megatron.longseq.flexsp.runtime.groups import open_groups
from megatron.longseq.flexsp.runtime.microbatch import GroupBatch, pack_documents
from tests.pool import RankPool

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


def connected() -> tuple[list[bool], float, float]:
    """Send attention's messages over groups that are connected late, and measure the memory of communicators.

    Returns:
        What arrived right; MiB of the device per communicator that attention's messages connect, and per communicator
        that an all-reduce connects.
    """
    device = torch.device("cuda", int(os.environ["RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    rank, size, mib = dist.get_rank(), dist.get_world_size(), []
    whole = tuple(range(size))
    made = open_groups(dist.group.WORLD, [(Mesh(size, 1), whole), (Mesh(1, size), whole)])
    count = 4  # communicators of attention: all-to-all, kv, grads, far_grads
    others = [dist.new_group(list(whole)) for _ in range(count)]
    right = []

    def connect() -> None:
        for mesh in (Mesh(size, 1), Mesh(1, size)):
            made.connect(made.strategy(mesh, whole))

    for act in (connect, lambda: [dist.all_reduce(torch.zeros(1, device=device), group=one) for one in others]):
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        act()
        torch.cuda.synchronize()
        mib.append((before - torch.cuda.mem_get_info()[0]) / count / 2**20)
    own = torch.arange(size, device=device) + 10 * rank
    exchange, ring = made.strategy(Mesh(size, 1), whole).ulysses, made.strategy(Mesh(1, size), whole).ring
    assert exchange is not None and ring is not None
    right.append(exchange.all_to_all(own).tolist() == [10 * other + rank for other in whole])
    for channel in (ring.kv, ring.grads, ring.far_kv, ring.far_grads):  # only rank 0 sends, and only rank 1 receives
        received = torch.zeros_like(own)
        channel.post([(1, own)] if rank == 0 else [], [(0, received)] if rank == 1 else []).wait()
        right.append(rank != 1 or received.tolist() == list(range(size)))
    dist.destroy_process_group()
    return right, mib[0], mib[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_groups_are_connected_by_what_attention_sends(ranks: RankPool, tell: Callable[[str], None]) -> None:
    size = torch.cuda.device_count()
    for right, own, reduced in ranks.run(size, connected, timeout=300):
        assert right == [True] * 5
        tell(f"{size} GPUs: {own:.0f} MiB per communicator of attention, {reduced:.0f} MiB per one of an all-reduce")
