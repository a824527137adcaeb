"""The memory of a bucket's gradients and parameters: the full bucket while layers use it, otherwise this rank's shard.

Layers, fused kernels and upstream's hooks keep views of the full bucket for good. Its storage gets memory from a pool
and gives it back under these views, so no view has to be bound again.
"""

from bisect import bisect_right
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import BufferType
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron.longseq.sharding.plan.collectives import Collectives
from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.buffer_pool import BufferPool
from megatron.longseq.sharding.runtime.collectives import Region
from megatron.longseq.sharding.runtime.comm_queue import Callback, Work
from megatron.longseq.sharding.runtime.comm_streams import allocate_on_default_stream
from megatron.longseq.sharding.runtime.state import ShardingState, cut

# Exchanges the memory of two storages, of which one may be empty (PyTorch 2.13; also used by its own CUDA graphs).
CAN_SWAP = hasattr(torch.UntypedStorage, "_swap_data_ptr_")
IN_FLIGHT = 2  # buckets of gradients in flight besides the one that is being filled: one on each kind of link


class FullBucket:
    """The memory of a full bucket, which is allocated and released under its views.

    On a GPU it belongs to the default stream, in which layers compute and which allocates and releases most of it.
    Upstream builds its wrapper in another stream, and autograd then runs the hooks of parameters in that one.

    Args:
        numel: elements of the bucket.
        dtype, device: of its tensor.
        pool: lends memory; None: the bucket allocates its own.
    """

    def __init__(
        self, numel: int, dtype: torch.dtype, device: torch.device | str, pool: BufferPool | None = None
    ) -> None:
        with allocate_on_default_stream(torch.device(device)):
            self.flat = torch.empty(numel, dtype=dtype, device=device)
        self.flat.zero_()
        self.is_allocated = True
        self._pool = pool if CAN_SWAP else None
        self._lender: Tensor | None = None  # the pool's buffer, without memory while the bucket has it

    def allocate(self, *, is_pooled: bool = True) -> None:
        """Allocate the memory, unless it is there already; its content is then undefined.

        Args:
            is_pooled: take it from the pool. Otherwise it is freed by `release`, so the pool does not keep it.
        """
        if not self.is_allocated and self._memory().resizable():
            if is_pooled and self._pool is not None:
                self._lender = self._pool.take(self.flat.numel(), self.flat.dtype, self.flat.device)
                self._memory()._swap_data_ptr_(self._lender.untyped_storage())  # type: ignore[attr-defined]
            else:
                with allocate_on_default_stream(self.flat.device):
                    self._memory().resize_(self.flat.numel() * self.flat.element_size())
        self.is_allocated = True

    def release(self) -> None:
        """Release the memory. Only the current and the default stream may still have queued work that reads it.

        Memory that is shared with something else, as with a checkpoint's writer on a CPU, stays allocated.
        """
        if self._lender is not None and self._pool is not None:
            self._memory()._swap_data_ptr_(self._lender.untyped_storage())  # type: ignore[attr-defined]
            self._pool.give(self._lender)
            self._lender = None
        elif self._memory().resizable():
            with allocate_on_default_stream(self.flat.device):
                self._memory().resize_(0)
        self.is_allocated = False

    def _memory(self) -> torch.UntypedStorage:
        return self.flat.untyped_storage()


class _Store:
    """A state of a bucket: the full bucket while it is allocated, and what this rank keeps.

    Args:
        sharding: of the job.
        level: sharding level of the state.
        numel: elements of the bucket.
        dtype, device: of the memory.

    Attributes:
        full: the full bucket.
        shard_range: elements of the bucket that this rank keeps.
        shard: their values; at level N, the full bucket.
    """

    def __init__(
        self, sharding: ShardingState, level: Level, numel: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.sharding, self.level, self.numel = sharding, level, numel
        self.full = FullBucket(numel, dtype, device, sharding.buffers)
        self.shard_range = sharding.shard_range(level, numel)
        self.shard = self.full.flat
        if level is not Level.NONE:
            self.shard = torch.empty(len(self.shard_range), dtype=dtype, device=device).zero_()


class GradStore(_Store):
    """Gradients of a bucket, in the dtype in which they accumulate.

    At level N they accumulate in the full bucket. At levels I and G they accumulate in this rank's shard, and the full
    bucket is scratch memory for the gradients of one micro-batch.

    Args:
        sharding: of the job.
        numel: elements of the bucket.
        dtype: dtype in which gradients accumulate.
        device: of the memory.
    """

    def __init__(self, sharding: ShardingState, numel: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(sharding, sharding.strategy.grads, numel, dtype, device)
        self._owned_range = sharding.shard_range(sharding.strategy.optimizer, numel)
        self._collectives = sharding.bucket_collectives(numel * (sharding.comm_dtype or dtype).itemsize)
        self._reducing: Work | None = None
        self._finishing: Work | None = None
        self._reduced_copy: Tensor | None = None
        self._finished_copy: Tensor | None = None
        self._copies_in_flight = IN_FLIGHT * sharding.groups.shards(self.level)  # as much as IN_FLIGHT full buckets

    @property
    def owned(self) -> Tensor:
        """A view of the sums that this rank's optimizer reads; defined after the work of `finish`.

        Returns:
            1-D, the elements of the bucket whose optimizer states this rank holds.
        """
        return cut(self.shard, self._owned_range, self.shard_range.start)

    def release_full(self) -> None:
        """Release the scratch memory, to which nothing has been added."""
        if self.level is not Level.NONE:
            self.full.release()

    def prepare(self) -> None:
        """Make the full bucket ready for a gradient to be added; if it has to be allocated, set it to zero."""
        if self._reducing is not None:
            self.wait_for_reduce()
        if not self.full.is_allocated:
            self.full.allocate()
            self.full.flat.zero_()

    def reduce(self, label: str, factor: float = 1.0) -> None:
        """Start adding the gradients of a micro-batch, which are complete in the full bucket, to the ranks' shards.

        Args:
            label: of the bucket.
            factor: by which the sum over ranks is multiplied.
        """
        in_flight = self.sharding.in_flight
        while len(in_flight) >= IN_FLIGHT:
            in_flight[0].wait_for_reduce()
        sent = self.full.flat
        if self.sharding.comm_dtype is not None:
            sent = self._reduced_copy = self._take(self.full.flat)
            sent.copy_(self.full.flat)
            self.full.release()  # the copy was made in the current stream

        def add() -> None:
            self.shard.add_(cut(sent, self.shard_range), alpha=factor)

        self._reducing = self._submit(self._collectives.grads, self.sharding.region(sent), label, add)
        in_flight.append(self)

    def wait_for_reduce(self) -> None:
        """Wait for the micro-batch in flight, if any, and release the scratch memory."""
        if self._reducing is not None:
            self._reducing.wait()
            self._reducing = None
            self.sharding.in_flight.remove(self)
            self.full.release()
            if self._reduced_copy is not None:
                self.sharding.buffers.give(self._reduced_copy)
                self._reduced_copy = None

    def finish(self, label: str) -> Work:
        """Start summing what has accumulated over all ranks; `owned` has the sums when the work is done."""
        collectives, owned, dtype = self._collectives.finish_grads, self.owned, self.sharding.comm_dtype
        if dtype is None:
            region = self._shard_region(self.shard)
            self._finishing = self._submit(collectives, region, label, None, self._reducing)
            return self._finishing
        copies = self.sharding.copies_in_flight
        while len(copies) >= self._copies_in_flight:
            copies[0].wait_for_finish()
        sent = self._finished_copy = self._take(self.shard)

        def copy() -> None:  # on the queue, behind the last micro-batch's reduction, which the copy must include
            sent.copy_(self.shard)

        def copy_back() -> None:
            owned.copy_(cut(sent, self._owned_range, self.shard_range.start))

        self._finishing = self._submit(collectives, self._shard_region(sent), label, copy_back, self._reducing, copy)
        copies.append(self)
        return self._finishing

    def wait_for_finish(self) -> None:
        """Wait for the work of `finish`, if any, and reuse the buffer that it sent."""
        if self._finishing is not None:
            self._finishing.wait()
            self._finishing = None
        if self._finished_copy is not None:
            self.sharding.copies_in_flight.remove(self)
            self.sharding.buffers.give(self._finished_copy)
            self._finished_copy = None

    def _shard_region(self, shard: Tensor) -> Region:
        return self.sharding.region(shard) if self.level is Level.NONE else Region(None, shard)

    def scale(self, factor: float | Tensor) -> None:
        """Multiply what has accumulated.

        Args:
            factor: number, or a tensor with one element.
        """
        self.shard.mul_(factor)

    def zero(self) -> None:
        """Set what has accumulated to zero."""
        self.wait_for_reduce()
        self.wait_for_finish()
        self.shard.zero_()

    def _take(self, like: Tensor) -> Tensor:
        """Return a buffer of the communication dtype, of the size of a tensor."""
        assert self.sharding.comm_dtype is not None
        return self.sharding.buffers.take(like.numel(), self.sharding.comm_dtype, like.device)

    def _submit(
        self,
        collectives: Collectives,
        region: Region,
        label: str,
        after: Callback | None,
        behind: Work | None = None,
        before: Callback | None = None,
    ) -> Work:
        return self.sharding.queues.submit(collectives, region, f"gradients of {label}", after, behind, before)


class ParamStore(_Store):
    """Parameters of a bucket, trained or frozen.

    At level N the full bucket is always allocated. At levels I and G this rank keeps its shard, and the full bucket is
    gathered for every use.

    Attributes:
        syncing: work of `sync`, until `finish_sync`.
    """

    def __init__(self, sharding: ShardingState, numel: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(sharding, sharding.strategy.params, numel, dtype, device)
        self._collectives = sharding.bucket_collectives(numel * dtype.itemsize)
        self.syncing: Work | None = None
        self._gathering: Work | None = None
        self._users: set[str] = set()

    def copy_shard_from_full(self) -> None:
        """Copy this rank's shard out of the full bucket, which something else has written."""
        if self.level is not Level.NONE:
            self.shard.copy_(cut(self.full.flat, self.shard_range))

    def keep_shard(self) -> None:
        """Keep this rank's shard of the initial values, which are in the full bucket, and release the bucket."""
        if self.level is not Level.NONE:
            self.sharding.share_initial(self.full.flat)
            self.copy_shard_from_full()
            self.full.release()

    def sync(self, label: str) -> None:
        """Start gathering what the ranks' optimizers have written, where a rank keeps more than it has trained."""
        region = Region(None, self.shard) if self.level is not Level.NONE else self.sharding.region(self.shard)
        collectives = self._collectives.finish_params
        if collectives:
            self.syncing = self.sharding.queues.submit(collectives, region, f"parameters of {label}")

    def finish_sync(self) -> None:
        """Wait for `sync`, if it has been started."""
        if self.syncing is not None:
            self.syncing.wait()
            self.syncing = None

    def gather(self, user: str, *, is_pooled: bool = True) -> None:
        """Start gathering the full bucket for a user, unless it is there already; behind `sync`, if it is at work.

        Args:
            user: name of the unit, for `release`.
            is_pooled: see `FullBucket.allocate`.
        """
        if self.level is Level.NONE:
            return
        self._users.add(user)
        if self.full.is_allocated:
            return
        self.full.allocate(is_pooled=is_pooled)
        full, shard = cut(self.full.flat, self.shard_range), self.shard

        def copy() -> None:
            full.copy_(shard)

        region, label = self.sharding.region(self.full.flat), f"parameters for {user}"
        self._gathering = self.sharding.queues.submit(
            self._collectives.params, region, label, behind=self.syncing, before=copy
        )

    def wait(self) -> None:
        """Wait for `gather` and `sync`, if they have been started."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None
        self.finish_sync()

    def release(self, user: str) -> None:
        """Release the full bucket once no user needs it any more."""
        self._users.discard(user)
        if self.level is not Level.NONE and not self._users:
            self.wait()
            self.full.release()


class WithoutMemory(TorchFunctionMode):
    """While it is active, `torch.zeros` creates tensors that have a size but no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "zeros":  # on a CPU, `torch.zeros` is a function around this one
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class BufferMemory:
    """The stores of a buffer's buckets, each created when its first view is needed.

    Args:
        sharding: of the job.
        device: of the memory.
    """

    def __init__(self, sharding: ShardingState, device: torch.device | str) -> None:
        self.grads: dict[int, GradStore] = {}
        self.params: dict[int, ParamStore] = {}
        self._sharding, self._device = sharding, device

    def bucket_at(self, buffer: Any, start: int) -> int:
        """Return the number of the bucket in which an element of upstream's buffer lies.

        Args:
            buffer: upstream's buffer of parameters and gradients.
            start: index of the element in the buffer.
        """
        return bisect_right(buffer.bucket_indices, start, key=lambda bounds: bounds[0]) - 1

    def view(self, buffer: Any, shape: torch.Size, start: int, kind: BufferType) -> Tensor:
        """Return the view of a given shape that begins at an element of upstream's buffer; it lies in one bucket.

        Args:
            buffer: upstream's buffer of parameters and gradients.
            shape: shape of the view.
            start: index of its first element in the buffer.
            kind: parameters or gradients.
        """
        bucket = self.bucket_at(buffer, start)
        first, end = buffer.bucket_indices[bucket]
        flat = self._full(buffer, bucket, end - first, kind).flat
        return flat[start - first : start - first + shape.numel()].view(shape)

    def _full(self, buffer: Any, bucket: int, numel: int, kind: BufferType) -> FullBucket:
        if kind is BufferType.GRAD:
            for other in list(self.grads.values())[:-1]:
                other.release_full()  # the next view of it is at most one bucket away
            if bucket not in self.grads:
                self.grads[bucket] = GradStore(self._sharding, numel, buffer.grad_dtype, self._device)
            self.grads[bucket].full.allocate()  # a view needs memory when it is created
            return self.grads[bucket].full
        if bucket not in self.params:
            self.params[bucket] = ParamStore(self._sharding, numel, buffer.param_dtype, self._device)
        return self.params[bucket].full
