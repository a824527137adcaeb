"""Buffers of collectives, which are reused, so that steps allocate none after the first one."""

from collections import defaultdict

import torch
from torch import Tensor

from megatron.longseq.sharding.runtime.comm_streams import allocate_on_default_stream


class BufferPool:
    """Flat buffers by bytes and device.

    The pool keeps what is given back, so it holds as many buffers of a size as were in use at a time. Sizes are rounded
    up by at most 1/256, so that buckets of nearly the same size share buffers: the final norm is in the last layer's.

    On a GPU a buffer belongs to the default stream: `give` makes it wait for the current stream, and `take` makes the
    current stream wait for it.

    Attributes:
        allocations: buffers that were allocated so far.
    """

    def __init__(self) -> None:
        self.allocations = 0
        self._free: defaultdict[tuple[int, torch.device], list[Tensor]] = defaultdict(list)

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer, whose content is undefined; nobody else has it until it is given back.

        Args:
            numel: number of elements.
            dtype: their type.
            device: device of the buffer.

        Returns:
            Tensor [numel].
        """
        with allocate_on_default_stream(device):
            capacity = _rounded(numel * dtype.itemsize)
            free = self._free[capacity, device]
            if not free:
                self.allocations += 1
                free.append(torch.empty(capacity // dtype.itemsize, dtype=dtype, device=device))
            # What was given back may be a shorter view of its memory than what is asked for now.
            return free.pop().view(torch.uint8).as_strided((numel * dtype.itemsize,), (1,)).view(dtype)

    def give(self, buffer: Tensor) -> None:
        """Give a buffer back. The current stream must have waited for whatever works on it.

        Args:
            buffer: what `take` has returned, of any dtype.
        """
        with allocate_on_default_stream(buffer.device):
            self._free[buffer.untyped_storage().nbytes(), buffer.device].append(buffer)


def _rounded(size: int) -> int:
    """Return the next multiple of 1/256 of the largest power of two that is not above `size`."""
    step = max(1, 1 << size.bit_length() >> 9)
    return -(-size // step) * step
