"""Buffers of collectives, which are reused, so that steps allocate none after the first one."""

from collections import defaultdict

import torch
from torch import Tensor

from megatron.longseq.sharding.runtime.comm_streams import allocate_on_default_stream


class BufferPool:
    """Flat buffers by bytes and device.

    The pool keeps what is given back, so it holds as many buffers of a size as were in use at a time.

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
            free = self._free[numel * dtype.itemsize, device]
            if free:
                return free.pop().view(dtype)
            self.allocations += 1
            return torch.empty(numel, dtype=dtype, device=device)

    def give(self, buffer: Tensor) -> None:
        """Give a buffer back. The current stream must have waited for whatever works on it.

        Args:
            buffer: what `take` has returned, of any dtype.
        """
        with allocate_on_default_stream(buffer.device):
            self._free[buffer.nbytes, buffer.device].append(buffer)
