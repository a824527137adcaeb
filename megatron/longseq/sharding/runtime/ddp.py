"""Upstream's data-parallel wrapper with model states sharded by a strategy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers
from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout

from megatron.longseq.sharding.plan.comm_volume import Bucket
from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.bucket_group import ShardedBucketGroup
from megatron.longseq.sharding.runtime.bucket_layout import by_unit, lay_out, unit_of
from megatron.longseq.sharding.runtime.bucket_storage import GradStore, ParamStore
from megatron.longseq.sharding.runtime.state import Sharding
from megatron.longseq.sharding.runtime.unit_hooks import Unit, Uses

Named = list[tuple[str, torch.nn.Parameter]]


class ShardedDataParallel(DistributedDataParallel):
    """A model chunk whose parameters, gradients and optimizer states are sharded each where the strategy says.

    Upstream's own becomes one as it is made (patch paro.wrapper), wherever upstream makes it. Its buffers' memory comes
    from `BufferMemory` (patch paro.buffers).

    Attributes:
        sharding: how.
        uses: gathers parameters and gives them back; None: they are whole at all times.
    """

    sharding: Sharding
    uses: Uses | None

    def open(
        self,
        init: Callable[..., None],
        config: Any,
        ddp_config: Any,
        module: torch.nn.Module,
        sharding: Sharding,
        bucket_size: int,
        pg_collection: Any = None,
    ) -> None:
        """Do what upstream's constructor does, and shard what it has made.

        Args:
            init: upstream's constructor.
            config, ddp_config, module, pg_collection: as upstream's.
            sharding: how.
            bucket_size: elements after which a bucket ends, at a unit's border; where parameters are sharded, every
                unit is a bucket. Neither depends on the pipeline stage.
        """
        named = list(module.named_parameters())
        trained = [(name, param) for name, param in named if param.requires_grad]
        layout = _layout(trained, sharding, bucket_size, ddp_config)
        init(self, config, ddp_config, module, pg_collection=pg_collection, full_param_layout=layout)
        self.sharding, self.uses = sharding, None
        self._shard_groups({param: unit_of(name) for name, param in trained})
        if sharding.strategy.params is not Level.NONE or sharding.strategy.grads is not Level.NONE:
            self._watch_units(named)
        if sharding.strategy.params is not Level.NONE:
            self._watch_state()

    def scale_gradients(self, scaling_factor: Any) -> None:
        """See upstream."""
        for group in self.bucket_groups:
            group.grads.scale(scaling_factor)

    def broadcast_params(self) -> None:
        """See upstream."""
        super().broadcast_params()
        self.take_parts()

    def make_whole(self) -> None:
        """Have all parameters whole, until the first is used."""
        if self.uses is not None:
            self.uses.make_whole()

    def take_parts(self) -> None:
        """Keep this rank's parts of whole parameters that something else has written."""
        for store in self._stores():
            store.take_part()

    def release_all(self) -> None:
        """Give whole parameters back: the optimizer is about to write this rank's parts."""
        if self.uses is not None:
            self.uses.release_all()

    def described(self) -> list[Bucket]:
        """Return the buckets as `traffic.bucket_traffic` takes them, once a first step has shown what is gathered."""
        uses = [] if self.uses is None else [(unit, store) for unit in self.uses.units for store in unit.stores]
        trained = {id(group.store): group.store for group in self.bucket_groups}
        stores = trained | {id(store): store for _, store in uses}
        gathers = dict.fromkeys(stores, 0)
        for unit, store in uses:
            gathers[id(store)] += 1 + unit.is_reached
        return [Bucket(store.numel, gathers[key], key in trained) for key, store in stores.items()]

    def _stores(self) -> list[ParamStore]:
        units = [] if self.uses is None else self.uses.units
        return list({id(store): store for unit in units for store in unit.stores}.values())

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Any:
        """Return upstream's hook, between what a sharded bucket does before and after a gradient is added."""
        add = super()._make_backward_post_hook(param)

        def hook(*unused: Any) -> None:
            group = self.param_to_bucket_group[param]
            group.before_grad()
            add(*unused)
            if group.reduces_each_microbatch:
                group.after_grad(param)

        return hook

    def _shard_groups(self, unit_names: dict[torch.nn.Parameter, str]) -> None:
        """Put a sharded bucket group in every one's place."""
        groups = []
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                label = f"{bucket.bucket_id} ({unit_names[bucket.params_list[0]]})"
                memory, place = buffer.longseq_memory, bucket.bucket_id
                stores = memory.grads[place], memory.params[place]
                stores[0].close()
                stores[1].take_part()
                groups.append(ShardedBucketGroup(bucket, self.ddp_config, buffer.data_parallel_group, *stores, label))
        self.bucket_groups = groups
        for group in groups:
            for param in group.params:
                self.param_to_bucket_group[param] = group
        if self.ddp_config.overlap_param_gather:
            for group, following in zip(groups[1:], groups, strict=False):
                group.next_param_gather_bucket_group = following

    def _watch_units(self, named: Named) -> None:
        """Have parameters whole, frozen ones too, and scratch there, only while units use them."""
        units: dict[str, _Stores] = {}
        for unit, params in by_unit(named).items():
            groups = {self.param_to_bucket_group[param]: None for _, param in params if param.requires_grad}
            units[unit] = _Stores([group.grads for group in groups], [group.store for group in groups])
            frozen = [(name, param) for name, param in params if not param.requires_grad]
            if self.sharding.strategy.params is not Level.NONE:
                units[unit].params.extend(_frozen_stores(frozen, self.sharding))
        tied = _tied(self.module)
        if tied is not None:  # the output layer computes with the embedding's weight
            mine, there = units.setdefault(tied.layer, _Stores([], [])), units[tied.embedding]
            mine.grads.extend(there.grads)
            mine.params.extend(there.params)
        if self.sharding.strategy.params is Level.NONE:
            units = {name: _Stores(kept.grads, []) for name, kept in units.items()}
        self.uses = Uses(
            [
                Unit(name, self.module.get_submodule(name), kept.params, not name.endswith("embedding"), kept.grads)
                for name, kept in units.items()
            ]
        )

    def _watch_state(self) -> None:
        """Have whole parameters where a checkpoint reads or writes them."""
        inner = self.module
        while hasattr(inner, "module"):
            inner = inner.module
        shown = inner.sharded_state_dict

        def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
            self.make_whole()
            return shown(*args, **kwargs)

        inner.sharded_state_dict = sharded_state_dict  # upstream unwraps a model before it asks for this
        inner.register_state_dict_pre_hook(lambda *unused: self.make_whole())
        inner.register_load_state_dict_pre_hook(lambda *unused: self.make_whole())
        inner.register_load_state_dict_post_hook(lambda *unused: self.take_parts())


class _Stores(NamedTuple):
    """What a unit uses."""

    grads: list[GradStore]
    params: list[ParamStore]


class _Tied(NamedTuple):
    """Names of the unit that computes with another one's weight, and of that."""

    layer: str
    embedding: str


def _tied(chunk: torch.nn.Module) -> _Tied | None:
    for name, module in chunk.named_modules():
        if getattr(module, "share_embeddings_and_output_weights", False) and module.pre_process and module.post_process:
            return _Tied(f"{name}.output_layer".lstrip("."), f"{name}.embedding".lstrip("."))
    return None


def _layout(trained: Named, sharding: Sharding, bucket_size: int, ddp_config: Any) -> FullParamLayout:
    """Return where trained parameters lie, for every one of upstream's buffers."""
    names = {param: name for name, param in trained}
    at_least = 0 if sharding.strategy.params is not Level.NONE else bucket_size
    padding = 2**16 if ddp_config.pad_buckets_for_high_nccl_busbw else 1
    grouped = group_params_for_buffers([param for _, param in trained], ddp_config.grad_reduce_in_fp32)
    shards = sharding.groups.shards(sharding.strategy.optimizer)
    layouts = {}
    for key, (params, indices) in grouped.items():
        made = lay_out([(names[param], param) for param in params], sharding.groups.ranks, at_least, padding=padding)
        # Padding counts as used: upstream's fully reshardable checkpoints leave it out between buckets, and then look
        # parameters up as if it were there (its issue 504), which mixes up tensors as soon as a bucket is padded.
        layouts[key] = PerBufferParamLayout(made.places, made.bounds, made.sizes, indices, shards)
    return FullParamLayout(layouts)


def _frozen_stores(params: Named, sharding: Sharding) -> list[ParamStore]:
    """Move a unit's frozen parameters into buckets, one of each type."""
    stores = []
    for dtype in {param.dtype: None for _, param in params}:
        of_type = [(name, param) for name, param in params if param.dtype == dtype]
        made = lay_out(of_type, sharding.groups.ranks, sum(param.numel() for _, param in of_type))
        store = ParamStore(sharding, made.bounds[-1][1], dtype, of_type[0][1].device)
        for _, param in of_type:
            first, end, _ = made.places[param]
            view = store.whole.flat[first:end].view(param.shape)
            view.copy_(param.data)
            param.data = view
        store.take_part()
        stores.append(store)
    return stores
