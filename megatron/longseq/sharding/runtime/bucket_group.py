"""A bucket group of upstream's data-parallel wrapper whose bucket is sharded by a strategy.

Upstream has one collective for gradients, in the last micro-batch, and one for parameters, after the optimizer's step.
Here `BucketCollectives` says which collectives there are, and when they run.
"""

from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch import Tensor

from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.bucket_storage import GradStore, ParamStore
from megatron.longseq.sharding.runtime.state import ShardingState


class ShardedBucketGroup(_ParamAndGradBucketGroup):
    """One sharded bucket, with the methods that upstream's wrapper and schedules call.

    Args:
        bucket: upstream's; its tensors are the stores' full buckets.
        ddp_config: upstream's.
        group: process group that optimizer states are sharded over.
        grads, params: stores of the bucket's gradients and parameters.
        label: of the bucket, for messages.
    """

    def __init__(self, bucket: Any, ddp_config: Any, group: Any, grads: GradStore, params: ParamStore, label: str):
        super().__init__([bucket], ddp_config, group, group.size())
        self.bucket, self.grads, self.store, self.label = bucket, grads, params, label
        self._views = {param: param.main_grad for param in bucket.params_list}
        self._counts = dict.fromkeys(bucket.params_list, 0)
        self._norms: list[Tensor] = []
        self._is_started = False

    @property
    def sharding(self) -> ShardingState:
        """How the bucket is sharded."""
        return self.grads.sharding

    @property
    def reduces_each_microbatch(self) -> bool:
        """Whether gradients are sharded while they accumulate."""
        return self.grads.level is not Level.NONE

    # Gradients.

    def before_grad(self) -> None:
        """Prepare the full bucket of gradients, which a backward is about to add to."""
        self.grads.prepare()

    def after_grad(self, param: torch.nn.Parameter) -> None:
        """Count a parameter's gradient; with the last one of the micro-batch, reduce the bucket."""
        self._counts[param] += 1
        if min(self._counts.values()) >= self.sharding.passes:
            self._reduce()

    def register_grad_ready(self, param: torch.nn.Parameter, force_all_reduce: bool | None = False) -> None:
        """See upstream. Where gradients are sharded, `after_grad` does this in every micro-batch."""
        if not self.reduces_each_microbatch:
            super().register_grad_ready(param, force_all_reduce)

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Start the collectives that complete a step's gradients; a second call does nothing.

        Raises:
            ValueError: `force_all_reduce` is set.
        """
        if force_all_reduce:
            raise ValueError("force_all_reduce is not supported with --paro, which reduces gradients to shards")
        if self._is_started:
            return
        if self.reduces_each_microbatch:
            self._refuse_missing_grads()
            self._check(torch.stack(self._norms) if self._norms else None)
            self._norms.clear()
        else:
            self._check(self.bucket.grad_data)
            self._scale()
        self._is_started = True
        self.grads.finish(self.label)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Wait until the sums over all ranks are where the optimizer reads them."""
        self.param_gather_dispatched = False
        if self.grad_reduce_finished:
            return
        self.start_grad_sync(force_all_reduce)
        self.grads.wait_for_finish()
        self.grads.wait_for_reduce()
        self.grad_reduce_finished = True
        if self.reduces_each_microbatch:
            self._show_owned()

    def reset(self) -> None:
        """See upstream; and set the step's gradients to zero."""
        super().reset()
        self._is_started = False
        self.grads.zero()
        self._norms.clear()
        self._counts = dict.fromkeys(self._counts, 0)
        for param, view in self._views.items():
            param.main_grad = view

    def _reduce(self) -> None:
        if self._is_started:
            raise RuntimeError(
                f"rank {torch.distributed.get_rank()}: bucket {self.label} got a gradient after the last micro-batch "
                "of the step. With --overlap-grad-reduce, run all backwards except the last inside no_sync()"
            )
        passes = self.sharding.passes
        self._counts = {param: count - passes for param, count in self._counts.items()}
        if self._is_checked:
            self._norms.append(self.bucket.grad_data.norm(p=2))
        factor = self.bucket.gradient_scaling_factor
        if self.bucket.grad_data.dtype is torch.float16:  # the sum over ranks would overflow
            self._scale()
            factor = 1.0
        self.grads.reduce(self.label, factor)
        if not self.sharding.overlaps_grads:
            self.grads.wait_for_reduce()
        elif self.is_last_microbatch:
            self.start_grad_sync()

    def _refuse_missing_grads(self) -> None:
        """Raise if a parameter had no gradient in the last micro-batch, so that the bucket was not reduced."""
        if any(self._counts.values()):
            missing = sum(count < self.sharding.passes for count in self._counts.values())
            raise RuntimeError(
                f"rank {torch.distributed.get_rank()}: {missing} of {len(self._counts)} parameters of bucket "
                f"{self.label} got no gradient in the last micro-batch, but sharded gradients (--paro with I or G as "
                "second letter) are reduced once all of them exist. Leave gradients unsharded (N), or freeze these "
                "parameters."
            )

    @property
    def _is_checked(self) -> bool:
        return bool(self.ddp_config.check_for_nan_in_grad or self.ddp_config.check_for_large_grads)

    def _check(self, values: Tensor | None) -> None:
        """Check this rank's gradients, or the norms of its micro-batches, as upstream does; the host waits, once."""
        if not self._is_checked or values is None:
            return
        grads, self.bucket.grad_data = self.bucket.grad_data, values
        try:
            self.check_grads(self.ddp_config.check_for_nan_in_grad, self.ddp_config.check_for_large_grads)
        finally:
            self.bucket.grad_data = grads

    def _scale(self) -> None:
        if self.bucket.gradient_scaling_factor != 1.0:
            with torch.no_grad():
                self.bucket.grad_data.mul_(self.bucket.gradient_scaling_factor)

    def _show_owned(self) -> None:
        """Set every parameter's `main_grad` to the elements that this rank's optimizer owns, in one dimension.

        What upstream does to gradients before the step (sums over tensor-parallel ranks and over both ends of a
        pipeline) works element by element, on ranks that own the same elements.
        """
        owned = self.sharding.shard_range(self.sharding.strategy.optimizer, self.grads.numel)
        for param, (start, end) in self.bucket.param_to_index.items():
            begin = min(max(start, owned.start), owned.stop)
            stop = max(min(end, owned.stop), begin)
            param.main_grad = self.grads.owned[begin - owned.start : stop - owned.start]

    # Parameters.

    def start_param_sync(self, force_sync: bool = False) -> None:
        """Start gathering what the optimizers wrote; wait for it where upstream would."""
        if not self.param_gather_dispatched:
            self.store.sync(self.label)
            self.param_gather_dispatched = True
        if force_sync or not self.ddp_config.overlap_param_gather:
            self.store.finish_sync()

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        """Wait for the parameters of all ranks, after starting to gather the next bucket's."""
        if not self.param_gather_dispatched:
            self.start_param_sync()
        if self.store.syncing is None:
            return
        following = self.next_param_gather_bucket_group
        if following is not None and not skip_next_bucket_dispatch and not following.param_gather_dispatched:
            following.start_param_sync()
        self.store.finish_sync()
