"""Memory of upstream's buffers, bucket by bucket, so that each bucket's can come and go.

Upstream allocates a buffer at once and cuts views out of it. Here those whole buffers take no memory, and a view comes
from the store of its bucket.
"""

from bisect import bisect_right
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import BufferType
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron.longseq.sharding.runtime.bucket_storage import GradStore, ParamStore, Whole
from megatron.longseq.sharding.runtime.state import Sharding


class WithoutMemory(TorchFunctionMode):
    """While it is on, `torch.zeros` makes tensors that have a size and no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.zeros:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class BufferMemory:
    """The stores of a buffer's buckets, each made when the first view of it is asked for.

    Args:
        sharding: how they are sharded.
        device: where.
    """

    def __init__(self, sharding: Sharding, device: torch.device | str) -> None:
        self.grads: dict[int, GradStore] = {}
        self.params: dict[int, ParamStore] = {}
        self._sharding, self._device = sharding, device

    def view(self, buffer: Any, shape: torch.Size, start: int, kind: BufferType) -> Tensor:
        """Return a view of upstream's buffer, of elements that lie in one bucket."""
        bucket = bisect_right(buffer.bucket_indices, start, key=lambda bounds: bounds[0]) - 1
        first, end = buffer.bucket_indices[bucket]
        whole = self._whole(buffer, bucket, end - first, kind).flat
        return whole[start - first : start - first + shape.numel()].view(shape)

    def _whole(self, buffer: Any, bucket: int, numel: int, kind: BufferType) -> Whole:
        if kind is BufferType.GRAD:
            for other in list(self.grads.values())[:-1]:
                other.close()  # the next view of it is at most one bucket away
            if bucket not in self.grads:
                self.grads[bucket] = GradStore(self._sharding, numel, buffer.grad_dtype, self._device)
            self.grads[bucket].whole.take()  # only memory that is there can be cut
            return self.grads[bucket].whole
        if bucket not in self.params:
            self.params[bucket] = ParamStore(self._sharding, numel, buffer.param_dtype, self._device)
        return self.params[bucket].whole
