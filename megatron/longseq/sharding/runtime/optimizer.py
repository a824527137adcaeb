"""Upstream's distributed optimizer, where a rank keeps shards of gradients and parameters instead of full buckets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import distrib_optimizer

from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.bucket_storage import ParamStore
from megatron.longseq.sharding.runtime.checkpoint import matching_weights
from megatron.longseq.sharding.runtime.initial_shards import WithoutValues
from megatron.longseq.sharding.runtime.optimizer_states import is_of_shards, load_shard_states, shard_states
from megatron.longseq.sharding.runtime.state import cut

Range = distrib_optimizer.Range
Relocate = Callable[[torch.nn.Parameter, Any], Any]  # a range of a parameter, where it lies in what this rank keeps


class ShardedOptimizer(distrib_optimizer.DistributedOptimizer):
    """The distributed optimizer over the strategy's process groups.

    Upstream finds an element by its place in a parameter or in a full bucket. Here places are relative to the shard
    that this rank keeps.

    Args:
        *args: as upstream's.
        model_chunks: sharded data-parallel wrappers.
        data_parallel_group, data_parallel_group_gloo, distributed_optimizer_instance_id: ignored; the strategy says
            over which ranks states are sharded, and which copy of them this rank keeps. Gloo groups have upstream's
            order of ranks, which is not that of shards.
        **named: as upstream's.
    """

    def __init__(
        self,
        *args: Any,
        model_chunks: list[Any],
        data_parallel_group: Any,
        data_parallel_group_gloo: Any,
        distributed_optimizer_instance_id: int,
        **named: Any,
    ) -> None:
        self.sharding = model_chunks[0].sharding
        self._relocate: tuple[str, Relocate] | None = None
        groups = self.sharding.optimizer_groups
        is_sharded, hidden = self.sharding.strategy.params is not Level.NONE, WithoutValues()
        if is_sharded:
            hidden.hide(param for chunk in model_chunks for group in chunk.bucket_groups for param in group.params)
        super().__init__(
            *args,
            model_chunks=model_chunks,
            data_parallel_group=groups.shards,
            data_parallel_group_gloo=None,
            distributed_optimizer_instance_id=groups.replicas.rank(),
            **named,
        )
        hidden.show()
        if not self.is_stub_optimizer and is_sharded:
            self._point_at_shards()
            self._copy_model_params_to_main_params()

    def get_grad_stats_parallel_group(self) -> dist.ProcessGroup:
        """Return the ranks that hold one copy of the optimizer states together; norms are sums over them."""
        return self.sharding.optimizer_groups.statistics

    def start_param_sync_for_bucket_group_subset(self) -> None:
        """Gather all buckets' new parameters; sharded parameters are waited for where they are used."""
        self._start_sync()
        for group in self._bucket_groups():
            if group.store.level is Level.NONE:
                group.store.finish_sync()

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> Any:
        """Return this rank's shards of main parameters and optimizer states, in upstream's format.

        Upstream builds whole tensors of all parameters on every rank. The pieces here are views of this rank's shards,
        or, if `is_loading`, of host memory of their size.

        Args:
            model_sharded_state_dict, is_loading, metadata: as upstream's.
        """
        found = shard_states(self, model_sharded_state_dict, is_loading=is_loading)
        if found is not None:
            return found
        return super().sharded_param_state_fully_reshardable(model_sharded_state_dict, is_loading, metadata)

    def load_parameter_state_from_fully_reshardable(self, state_dict: Any) -> None:
        """See upstream; and refuse states that do not belong to the weights."""
        with matching_weights(self, self._stores()):
            if is_of_shards(state_dict):
                load_shard_states(self, state_dict)
            else:
                super().load_parameter_state_from_fully_reshardable(state_dict)

    def _get_model_param_range_map(self, param: torch.nn.Parameter) -> dict[str, Any]:
        ranges: dict[str, Any] = super()._get_model_param_range_map(param)
        if self._relocate is None:
            return ranges
        kind, relocate = self._relocate
        return {**ranges, kind: relocate(param, ranges[kind])}

    def _copy_model_grads_to_main_grads(self) -> None:
        if self.is_stub_optimizer or self.sharding.strategy.grads is Level.NONE:
            super()._copy_model_grads_to_main_grads()
            return
        # A sharded gradient is what this rank owns of it (`ShardedBucketGroup._show_owned`), from element 0 on.
        with self._relocated("param", lambda param, span: Range(0, span.size)):
            super()._copy_model_grads_to_main_grads()

    def _copy_main_params_to_model_params(self) -> None:
        if self.is_stub_optimizer or self.sharding.strategy.params is Level.NONE:
            super()._copy_main_params_to_model_params()
            return
        with self._writing_shards():
            super()._copy_main_params_to_model_params()
        self._start_sync()  # whatever upstream overlaps: the first unit is gathered before upstream's own hook would

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        """See upstream. Where parameters are sharded, main parameters are copied from this rank's shards."""
        if self.is_stub_optimizer or self.sharding.strategy.params is Level.NONE or state_dict is not None:
            super()._copy_model_params_to_main_params(state_dict)
            return
        for shards, mains in zip(self.shard_float16_groups, self.shard_fp32_from_float16_groups, strict=True):
            for shard, main in zip(shards, mains, strict=True):
                main.data.copy_(shard.data)  # main parameters of float32 parameters are views of the shards

    def _bucket_groups(self) -> list[Any]:
        return [group for chunk in self.model_chunks for group in chunk.bucket_groups]

    def _stores(self) -> dict[torch.nn.Parameter, ParamStore]:
        return {param: group.store for group in self._bucket_groups() for param in group.params}

    def _start_sync(self) -> None:
        """Start gathering all buckets' new parameters, in the order in which the next forward reads them."""
        for chunk in self.model_chunks:
            for group in reversed(chunk.bucket_groups):
                if not group.param_gather_dispatched:
                    group.store.sync(group.label)
                    group.param_gather_dispatched = True

    @contextmanager
    def _relocated(self, kind: str, relocate: Relocate) -> Iterator[None]:
        """Move the ranges of one kind that upstream looks up inside."""
        self._relocate = kind, relocate
        try:
            yield
        finally:
            self._relocate = None

    @contextmanager
    def _writing_shards(self) -> Iterator[None]:
        """Let upstream write this rank's shards instead of full buckets."""
        stores, groups = self._stores(), self._bucket_groups()
        full = [group.bucket.param_data for group in groups]

        def relocate(param: torch.nn.Parameter, span: Any) -> Any:
            first = stores[param].shard_range.start
            return Range(span.start - first, span.end - first)

        for chunk in self.model_chunks:
            chunk.release_all()
        for group in groups:
            group.bucket.param_data = group.store.shard
        try:
            with self._relocated("gbuf_world_in_bucket", relocate):
                yield
        finally:
            for group, data in zip(groups, full, strict=True):
                group.bucket.param_data = data

    def _point_at_shards(self) -> None:
        """Make what upstream has cut from full parameters views of this rank's shards."""
        stores = self._stores()
        pairs = [
            *zip(self.model_fp32_groups, self.shard_fp32_groups, strict=True),
            *zip(self.model_float16_groups, self.shard_float16_groups, strict=True),
        ]
        for params, shards in pairs:
            for param, shard in zip(params, shards, strict=True):
                span = self._get_model_param_range_map(param)["gbuf_world_in_bucket"]
                store = stores[param]
                shard.data = cut(store.shard, range(span.start, span.end), store.shard_range.start)
