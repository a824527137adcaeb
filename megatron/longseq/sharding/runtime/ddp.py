"""Upstream's data-parallel wrapper and its buffers, with model states sharded by a strategy."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import distributed_data_parallel, param_and_grad_buffer
from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout
from torch import Tensor

from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.bucket_group import ShardedBucketGroup
from megatron.longseq.sharding.runtime.bucket_layout import by_unit, lay_out, units_of
from megatron.longseq.sharding.runtime.bucket_storage import BufferMemory, GradStore, ParamStore, WithoutMemory
from megatron.longseq.sharding.runtime.initial_shards import (
    WithoutValues,
    forget_initial,
    gather_initial,
    store_params,
)
from megatron.longseq.sharding.runtime.selective_hooks import SelectiveGatherHooks
from megatron.longseq.sharding.runtime.state import ShardingState
from megatron.longseq.sharding.runtime.state_dicts import ShardedStateDicts
from megatron.longseq.sharding.runtime.unit_hooks import GatherHooks, Unit

Named = list[tuple[str, torch.nn.Parameter]]

# Upstream's classes are named through their modules, because patches replace every other name by the classes below.


@dataclass
class ShardedLayout(PerBufferParamLayout):
    """Upstream's layout of a buffer, with the state that the buffer's memory is sharded by."""

    sharding: ShardingState | None = None


class ShardedBuffer(param_and_grad_buffer._ParamAndGradBuffer):
    """Upstream's buffer, whose memory is allocated bucket by bucket so that each bucket's can be released.

    Args:
        ddp_config, param_dtype, grad_dtype, params_with_names: as upstream's.
        data_parallel_group: ignored; optimizer states are sharded over the strategy's process group.
        *rest: as upstream's.
        param_layout: where parameters lie, with the sharding state.
    """

    def __init__(
        self,
        ddp_config: Any,
        param_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        params_with_names: list[tuple[torch.nn.Parameter, str]],
        data_parallel_group: Any,
        *rest: Any,
        param_layout: ShardedLayout,
    ) -> None:
        sharding = param_layout.sharding
        assert sharding is not None, "ShardedDataParallel has made the layout"
        self.sharding, self.hidden = sharding, WithoutValues()
        self.memory = BufferMemory(sharding, torch.zeros(0, device=torch.cuda.current_device()).device)
        shards = sharding.optimizer_groups.shards
        with WithoutMemory():
            super().__init__(
                ddp_config, param_dtype, grad_dtype, params_with_names, shards, *rest, param_layout=param_layout
            )

    def _get(self, shape: torch.Size, start_index: int, buffer_type: Any) -> Tensor:
        bucket = self.memory.bucket_at(self, start_index)
        if buffer_type is param_and_grad_buffer.BufferType.PARAM and bucket not in self.memory.params:
            gather_initial([param for param, (*_, at) in self.param_index_map.items() if at == bucket], self.sharding)
        return self.memory.view(self, shape, start_index, buffer_type)

    def _new_bucket(self, *, bucket_id: int, bucket_params: list[torch.nn.Parameter], **rest: Any) -> Any:
        """See upstream, which calls this once it has copied the parameters of a bucket into it."""
        made = super()._new_bucket(bucket_id=bucket_id, bucket_params=bucket_params, **rest)
        store = self.memory.params[bucket_id]
        store.keep_shard()
        forget_initial(bucket_params, self.sharding)
        if store.level is not Level.NONE:
            self.hidden.hide(bucket_params)
        return made


class ShardedDataParallel(distributed_data_parallel.DistributedDataParallel):
    """A model chunk whose parameters, gradients and optimizer states are sharded by a strategy.

    Args:
        config, ddp_config, module, pg_collection: as upstream's.
        sharding: of the job.
        bucket_size: elements after which a bucket ends, at the end of a unit. Where parameters are sharded, every unit
            is a bucket. Neither depends on the pipeline stage.

    Attributes:
        sharding: of the job.
        gather_hooks: gather and release parameters, and allocate scratch for gradients; None if nothing is sharded
            while layers compute.
        counts_grads: whether a gradient counts as one of the backward passes that make up a micro-batch.
    """

    def __init__(
        self,
        config: Any,
        ddp_config: Any,
        module: torch.nn.Module,
        sharding: ShardingState,
        bucket_size: int,
        pg_collection: Any = None,
    ) -> None:
        named = list(module.named_parameters())
        trained = [(name, param) for name, param in named if param.requires_grad]
        units = units_of(name for name, _ in named)
        layout = _layout(trained, units, sharding, bucket_size, ddp_config)
        super().__init__(config, ddp_config, module, pg_collection=pg_collection, full_param_layout=layout)
        for buffer in self.buffers:
            buffer.hidden.show()
        self.intra_dp_cp_group = sharding.optimizer_groups.shards
        self.sharding: ShardingState = sharding
        self.gather_hooks: GatherHooks | None = None
        self.counts_grads = True
        self._shard_groups({param: units[name] for name, param in trained})
        if sharding.strategy.params is not Level.NONE or sharding.strategy.grads is not Level.NONE:
            self._hook_units(named)
        if sharding.strategy.params is not Level.NONE:
            self._hook_state_dicts()

    def scale_gradients(self, scaling_factor: Any) -> None:
        """See upstream."""
        for group in self.bucket_groups:
            group.grads.scale(scaling_factor)

    def zero_grad_buffer(self) -> None:
        """See upstream, which calls this when a step begins."""
        super().zero_grad_buffer()
        if self.gather_hooks is not None:
            self.gather_hooks.begin_step()

    def broadcast_params(self) -> None:
        """See upstream. Sharded parameters were broadcast before each bucket was sharded."""
        if self.sharding.strategy.params is Level.NONE:
            super().broadcast_params()

    def gather_all(self) -> None:
        """Gather all parameters; they stay until the first unit is used."""
        if self.gather_hooks is not None:
            self.gather_hooks.gather_all()

    def release_all(self) -> None:
        """Release full parameters: the optimizer is about to write this rank's shards."""
        if self.gather_hooks is not None:
            self.gather_hooks.release_all()

    @contextlib.contextmanager
    def loss_backward(self) -> Iterator[None]:
        """Enclose the backward of a loss that has a graph of its own.

        A parameter that the loss reads gets a gradient there besides those of the micro-batch's segments.
        """
        self.counts_grads = False
        try:
            yield
        finally:
            self.counts_grads = True

    def _unit_stores(self) -> list[ParamStore]:
        units = [] if self.gather_hooks is None else self.gather_hooks.units
        return list({id(store): store for unit in units for store in unit.stores}.values())

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Any:
        """Return upstream's hook, with what a sharded bucket does before and after a gradient is added."""
        add = super()._make_backward_post_hook(param)

        def hook(*unused: Any) -> None:
            group = self.param_to_bucket_group[param]
            group.before_grad()
            add(*unused)
            if group.reduces_each_microbatch and self.counts_grads:
                group.after_grad(param)

        return hook

    def _shard_groups(self, unit_names: dict[torch.nn.Parameter, str]) -> None:
        """Replace upstream's bucket groups by sharded ones, one for each bucket."""
        groups = []
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                label = f"{bucket.bucket_id} ({unit_names[bucket.params_list[0]]})"
                grads, params = buffer.memory.grads[bucket.bucket_id], buffer.memory.params[bucket.bucket_id]
                grads.release_full()
                group = buffer.data_parallel_group
                groups.append(ShardedBucketGroup(bucket, self.ddp_config, group, grads, params, label))
        self.bucket_groups = groups
        for group in groups:
            for param in group.params:
                self.param_to_bucket_group[param] = group
        if self.ddp_config.overlap_param_gather:
            for group, following in zip(groups[1:], groups, strict=False):
                group.next_param_gather_bucket_group = following

    def _hook_units(self, named: Named) -> None:
        """Have units gather their parameters, frozen ones included, and allocate their scratch for gradients."""
        units: dict[str, _Stores] = {}
        params = by_unit(named)
        for unit, named_params in params.items():
            groups = {self.param_to_bucket_group[param]: None for _, param in named_params if param.requires_grad}
            units[unit] = _Stores([group.grads for group in groups], [group.store for group in groups])
            frozen = [(name, param) for name, param in named_params if not param.requires_grad]
            if self.sharding.strategy.params is not Level.NONE:
                units[unit].params.extend(_frozen_stores(frozen, self.sharding))
        tied = _tied(self.module)
        if tied is not None:  # the output layer computes with the embedding's weight
            mine, theirs = units.setdefault(tied[0], _Stores([], [])), units[tied[1]]
            mine.grads.extend(theirs.grads)
            mine.params.extend(theirs.params)
        if self.sharding.strategy.params is Level.NONE:
            units = {name: _Stores(stores.grads, []) for name, stores in units.items()}
        made = [self._unit(name, stores, params.get(name, [])) for name, stores in units.items()]
        if not self.sharding.prefetch_units:
            self.gather_hooks = GatherHooks(made)
            return
        self.gather_hooks = SelectiveGatherHooks(
            made,
            self.sharding.prefetch_units,
            communicates=self.config.context_parallel_size > 1,
            is_last=lambda: all(group.is_last_microbatch for group in self.bucket_groups),
        )

    def _unit(self, name: str, stores: "_Stores", params: Named) -> Unit:
        holders = dict.fromkeys(param.rpartition(".")[0] for param, _ in params)
        tails = [self.module.get_submodule(holder) for holder in holders if not f"{holder}.".startswith(f"{name}.")]
        has_backward = not name.endswith("embedding")
        return Unit(name, self.module.get_submodule(name), stores.params, has_backward, stores.grads, tails)

    def _hook_state_dicts(self) -> None:
        """Let checkpoints read and write this rank's shards."""
        inner = self.module
        while hasattr(inner, "module"):
            inner = inner.module
        stores = {store.full.flat.untyped_storage()._cdata: store for store in self._unit_stores()}
        of_params = {param: stores.get(param.untyped_storage()._cdata) for param in inner.parameters()}
        sharded = {param: store for param, store in of_params.items() if store is not None}
        assert self.gather_hooks is not None, "units of sharded parameters are hooked"
        ShardedStateDicts(inner, sharded, self.gather_hooks.gather_all, self.gather_hooks.release_all)


class _Stores(NamedTuple):
    """What a unit uses."""

    grads: list[GradStore]
    params: list[ParamStore]


def _tied(chunk: torch.nn.Module) -> tuple[str, str] | None:
    """Return the names of the unit that computes with another one's weight, and of that one."""
    for name, module in chunk.named_modules():
        if getattr(module, "share_embeddings_and_output_weights", False) and module.pre_process and module.post_process:
            return f"{name}.output_layer".lstrip("."), f"{name}.embedding".lstrip(".")
    return None


def _layout(
    trained: Named, units: Mapping[str, str], sharding: ShardingState, bucket_size: int, ddp_config: Any
) -> FullParamLayout:
    """Return where trained parameters lie, for each of upstream's buffers."""
    names = {param: name for name, param in trained}
    at_least = 0 if sharding.strategy.params is not Level.NONE else bucket_size
    padding = 2**16 if ddp_config.pad_buckets_for_high_nccl_busbw else 1
    params_only = [param for _, param in trained]
    grouped = param_and_grad_buffer.group_params_for_buffers(params_only, ddp_config.grad_reduce_in_fp32)
    shards = sharding.groups.shards(sharding.strategy.optimizer)
    layouts = {}
    for key, (params, indices) in grouped.items():
        of_key = [(names[param], param) for param in params]
        made = lay_out(of_key, sharding.groups.ranks, at_least, padding=padding, units=units)
        # Padding counts as used: upstream's fully reshardable checkpoints leave it out between buckets, and then look
        # parameters up as if it were there (its issue 504), which mixes up tensors as soon as a bucket is padded.
        layouts[key] = ShardedLayout(made.places, made.bounds, made.sizes, indices, shards, sharding)
    return FullParamLayout(layouts)


def _frozen_stores(params: Named, sharding: ShardingState) -> list[ParamStore]:
    """Move a unit's frozen parameters into buckets, one for each dtype."""
    frozen = [param for _, param in params]
    gather_initial(frozen, sharding)
    stores = [store for store, _ in store_params(params, sharding)]
    forget_initial(frozen, sharding)
    return stores
