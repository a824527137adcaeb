"""A pool lends buffers of nearly the same size in turn."""

import torch

from megatron.longseq.sharding.runtime.buffer_pool import BufferPool

CPU = torch.device("cpu")


def test_buckets_of_nearly_the_same_size_share_a_buffer() -> None:
    pool = BufferPool()
    first = pool.take(1_000_000, torch.float32, CPU)
    address = first.data_ptr()
    assert first.shape == (1_000_000,)
    pool.give(first)
    second = pool.take(1_000_100, torch.float32, CPU)  # with the final norm, say
    assert second.shape == (1_000_100,) and second.data_ptr() == address and pool.allocations == 1
    second.fill_(1.0)
    pool.give(second)
    third = pool.take(2_000_000, torch.bfloat16, CPU)
    assert third.dtype == torch.bfloat16 and third.data_ptr() == address and pool.allocations == 1
    assert pool.take(1_000_000, torch.float32, CPU).data_ptr() != address and pool.allocations == 2


def test_a_buffer_is_hardly_larger_than_asked() -> None:
    for numel in (1, 2, 3, 63, 64, 65, 1000, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 5):
        buffer = BufferPool().take(numel, torch.float32, CPU)
        assert buffer.nbytes <= buffer.untyped_storage().nbytes() <= buffer.nbytes * 257 / 256
