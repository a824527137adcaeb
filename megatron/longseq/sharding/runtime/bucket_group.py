"""A bucket group of upstream's data-parallel wrapper whose bucket is sharded by a strategy.

Upstream's has one collective for gradients, in the last micro-batch, and one for parameters, after the step. Here a
strategy says which there are, and when: `phases.Program`.
"""

from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch import Tensor

from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.bucket_storage import GradStore, ParamStore
from megatron.longseq.sharding.runtime.comm_queue import Handle
from megatron.longseq.sharding.runtime.state import Sharding


class ShardedBucketGroup(_ParamAndGradBucketGroup):
    """One bucket, with the methods that upstream's wrapper and schedules call.

    Args:
        bucket: upstream's; its tensors are the stores' whole buckets.
        ddp_config: upstream's.
        group: over which the optimizer shards.
        grads, params: where its gradients and parameters lie.
        label: of the bucket, for messages.
    """

    def __init__(self, bucket: Any, ddp_config: Any, group: Any, grads: GradStore, params: ParamStore, label: str):
        super().__init__([bucket], ddp_config, group, group.size())
        self.bucket, self.grads, self.store, self.label = bucket, grads, params, label
        self._views = {param: param.main_grad for param in bucket.params_list}
        self._counts = dict.fromkeys(bucket.params_list, 0)
        self._norms: list[Tensor] = []
        self._finishing: Handle | None = None
        self._is_started = False

    @property
    def sharding(self) -> Sharding:
        """How the bucket is sharded."""
        return self.grads.sharding

    @property
    def reduces_each_microbatch(self) -> bool:
        """Whether gradients are sharded while they accumulate."""
        return self.grads.level is not Level.NONE

    # Gradients.

    def before_grad(self) -> None:
        """Have the whole bucket of gradients there: a backward is about to add to it."""
        self.grads.open()

    def after_grad(self, param: torch.nn.Parameter) -> None:
        """Count a parameter's gradient; with the micro-batch's last one, send the bucket."""
        self._counts[param] += 1
        if min(self._counts.values()) >= self.sharding.passes:
            self._reduce()

    def register_grad_ready(self, param: torch.nn.Parameter, force_all_reduce: bool | None = False) -> None:
        """See upstream; where gradients are sharded, every micro-batch sends them (`after_grad`)."""
        if not self.reduces_each_microbatch:
            super().register_grad_ready(param, force_all_reduce)

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Start the collectives that end a step's gradients; a second call does nothing."""
        if force_all_reduce:
            raise ValueError("force_all_reduce: a sharding strategy (--paro) sums gradients to where they are kept")
        if self._is_started:
            return
        if self.reduces_each_microbatch:
            self._reduce_rest()
            self._check(torch.stack(self._norms) if self._norms else None)
            self._norms.clear()
        else:
            self._check(self.bucket.grad_data)
            self._scale()
        self._is_started = True
        self._finishing = self.grads.finish(self.label)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Have the sums of all ranks where the optimizer reads them."""
        self.param_gather_dispatched = False
        if self.grad_reduce_finished:
            return
        self.start_grad_sync(force_all_reduce)
        assert self._finishing is not None, "start_grad_sync has started it"
        self._finishing.wait()
        self._finishing = None
        self.grads.settle()
        self.grad_reduce_finished = True
        if self.reduces_each_microbatch:
            self._show_owned()

    def reset(self) -> None:
        """See upstream; and forget the step's gradients."""
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
                f"rank {torch.distributed.get_rank()}: bucket {self.label} had a gradient after the step's last "
                "micro-batch: with --overlap-grad-reduce, all backwards but the last run inside no_sync()"
            )
        passes = self.sharding.passes
        self._counts = {param: count - passes for param, count in self._counts.items()}
        if self._is_checked:
            self._norms.append(self.bucket.grad_data.norm(p=2))
        factor = self.bucket.gradient_scaling_factor
        if self.bucket.grad_data.dtype is torch.float16:  # the ranks' sum would overflow
            self._scale()
            factor = 1.0
        self.grads.reduce(self.label, factor)
        if not self.sharding.overlaps_grads:
            self.grads.settle()
        elif self.is_last_microbatch:
            self.start_grad_sync()

    def _reduce_rest(self) -> None:
        """Send what no complete micro-batch has sent: a parameter that took no part in the last one."""
        if any(self._counts.values()):
            missing = sum(count < self.sharding.passes for count in self._counts.values())
            raise RuntimeError(
                f"rank {torch.distributed.get_rank()}: {missing} of {len(self._counts)} parameters of bucket "
                f"{self.label} had no gradient in the last micro-batch, but sharded gradients (--paro with I or G as "
                "second letter) are reduced when all are there. Keep gradients whole (N), or freeze those parameters."
            )

    @property
    def _is_checked(self) -> bool:
        return bool(self.ddp_config.check_for_nan_in_grad or self.ddp_config.check_for_large_grads)

    def _check(self, values: Tensor | None) -> None:
        """Look for what is no number in this rank's gradients, or norms of its micro-batches: the host waits, once."""
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
        """Let every parameter's gradient be what this rank owns of it, in one dimension.

        What upstream still does to gradients before the step (sums over tensor-parallel ranks and over both ends of a
        pipeline) is done element by element, by ranks that own the same elements.
        """
        first = self.sharding.span(self.sharding.strategy.optimizer, self.grads.numel)
        for param, (start, end) in self.bucket.param_to_index.items():
            begin = min(max(start, first.start), first.stop)
            stop = max(min(end, first.stop), begin)
            param.main_grad = self.grads.owned[begin - first.start : stop - first.start]

    # Parameters.

    def start_param_sync(self, force_sync: bool = False) -> None:
        """Start sending what the optimizer wrote; wait for it where upstream would."""
        if not self.param_gather_dispatched:
            self.store.sync(self.label)
            self.param_gather_dispatched = True
        if force_sync or not self.ddp_config.overlap_param_gather:
            self.store.finish_sync()

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        """Have the parameters of all ranks, and start the next bucket's before waiting for them."""
        if not self.param_gather_dispatched:
            self.start_param_sync()
        if self.store.syncing is None:
            return
        following = self.next_param_gather_bucket_group
        if following is not None and not skip_next_bucket_dispatch and not following.param_gather_dispatched:
            following.start_param_sync()
        self.store.finish_sync()
