"""The pool of buffers on a GPU: buckets swap its memory under their views; no stream overwrites another's values."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from megatron.longseq.sharding.plan.collectives import SCATTER_INSIDE
from megatron.longseq.sharding.runtime.bucket_storage import CAN_SWAP, FullBucket
from megatron.longseq.sharding.runtime.buffer_pool import BufferPool
from megatron.longseq.sharding.runtime.collectives import Region
from tests.gpu.test_sharding_lanes import LONG, lanes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZE = 1 << 20


def released_buckets(pool: BufferPool, count: int) -> list[FullBucket]:
    """Return buckets without memory."""
    buckets = [FullBucket(SIZE, torch.float32, torch.device("cuda", 0), pool) for _ in range(count)]
    for bucket in buckets:
        bucket.release()
    return buckets


@pytest.mark.skipif(not CAN_SWAP, reason="this PyTorch has no UntypedStorage._swap_data_ptr_")
def test_buckets_use_one_buffer_in_turn_and_only_after_queues() -> None:
    """Hooks of parameters give memory back in the stream in which upstream's wrapper was created."""
    pool, hooks = BufferPool(), torch.cuda.Stream()
    buckets = released_buckets(pool, 5)
    views = [bucket.flat[SIZE // 2 :].view(2, -1) for bucket in buckets]
    totals = [torch.zeros(SIZE, device="cuda") for _ in buckets]
    with lanes() as mine:
        for number, bucket in enumerate(buckets):
            bucket.allocate()
            bucket.flat.fill_(number)
            assert views[number].data_ptr() == bucket.flat[SIZE // 2 :].data_ptr()
            hooks.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(hooks):
                add = partial(totals[number].add_, bucket.flat)
                mine.submit((SCATTER_INSIDE,), Region(None, bucket.flat), "x", add).wait()
                bucket.release()
    torch.cuda.synchronize()
    assert pool.allocations == 1 and not any(bucket.flat.untyped_storage().nbytes() for bucket in buckets)
    assert all((total == 2 * number + 1).all() for number, total in enumerate(totals))


@pytest.mark.skipif(not CAN_SWAP, reason="this PyTorch has no UntypedStorage._swap_data_ptr_")
def test_later_rounds_ask_the_allocator_for_nothing() -> None:
    pool = BufferPool()
    buckets = released_buckets(pool, 4)
    asked = []
    for _ in range(3):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for first, second in pairwise(buckets):
            first.allocate()
            second.allocate()
            first.release()
        buckets[-1].release()
        asked.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
    assert asked == [2, 0, 0] and pool.allocations == 2


def test_a_stream_that_takes_a_buffer_waits_for_the_stream_that_gave_it() -> None:
    pool, device, side = BufferPool(), torch.device("cuda", 0), torch.cuda.Stream()
    total = torch.zeros(SIZE, device=device)
    for giver, taker in ((torch.cuda.default_stream(), side), (side, torch.cuda.default_stream())):
        with torch.cuda.stream(giver):
            buffer = pool.take(SIZE, torch.float32, device)
            torch.cuda._sleep(LONG)
            buffer.fill_(1)
            total.add_(buffer)
            pool.give(buffer)
        with torch.cuda.stream(taker):
            pool.take(SIZE, torch.float32, device).fill_(99)
        torch.cuda.synchronize()
        pool.give(buffer)
    assert (total == 2).all()
