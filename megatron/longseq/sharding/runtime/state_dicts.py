"""Sharded parameters in a model's state dicts: a checkpoint reads and writes this rank's shards, without gathering."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor

from megatron.longseq.sharding.runtime.bucket_storage import ParamStore
from megatron.longseq.sharding.runtime.pieces import cut_into_pieces, sharded_pieces
from megatron.longseq.sharding.runtime.state import cut


@dataclass
class ShardFactory(ShardedTensorFactory):
    """Describes a sharded parameter by the pieces that this rank keeps of it.

    Attributes:
        whole: upstream's description of the parameter.
    """

    whole: ShardedBase | None = None


def whole_of(base: ShardedBase) -> ShardedBase:
    """Return upstream's description of a parameter."""
    whole = base.whole if isinstance(base, ShardFactory) else None
    return base if whole is None else whole


class ShardedStateDicts:
    """Lets upstream's checkpoints read and write shards of a model, and gathers parameters for plain state dicts.

    Args:
        model: that upstream asks for its state dict.
        stores: of its sharded parameters.
        gather_all: gathers all parameters of the model; they stay until the first unit is used.
        release_all: releases what is gathered.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stores: Mapping[torch.nn.Parameter, ParamStore],
        gather_all: Callable[[], None],
        release_all: Callable[[], None],
    ) -> None:
        self._stores, self._gather_all, self._release_all = stores, gather_all, release_all
        self._describe = model.sharded_state_dict
        self._loaded: list[str] = []  # names of parameters whose shards are loaded already
        model.sharded_state_dict = self._sharded_state_dict  # type: ignore[assignment]  # upstream unwraps the model
        model.register_state_dict_pre_hook(lambda *unused: gather_all())
        model.register_load_state_dict_pre_hook(self._before_loading)
        model.register_load_state_dict_post_hook(self._after_loading)

    def _sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = self._describe(*args, **kwargs)
        sharded = {
            name: (base, self._stores[base.data])
            for name, base in state.items()
            if isinstance(base, ShardedTensor | ShardedTensorFactory) and base.data in self._stores
        }
        if any(cut_into_pieces(base, range(base.data.numel())) is None for base, _ in sharded.values()):
            self._gather_all()  # upstream splits a parameter in a way that leaves no ranges whole
            return state
        for name, (base, store) in sharded.items():
            store.finish_sync()  # which may still write the shard after the last step
            state[name] = _shard_of(base, store)
        return state

    def _before_loading(self, _module: Any, state_dict: dict[str, Any], *_unused: Any) -> None:
        self._loaded = [name for name, value in state_dict.items() if isinstance(value, Tensor) and value.is_meta]
        if not self._loaded:
            self._gather_all()
        for name in self._loaded:
            del state_dict[name]

    def _after_loading(self, _module: Any, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in self._loaded]
        if self._loaded:
            self._release_all()  # what is gathered is older than the shards
            return
        for store in dict.fromkeys(self._stores.values()):
            store.copy_shard_from_full()


def _shard_of(base: ShardedBase, store: ParamStore) -> ShardedBase | LocalNonpersistentObject:
    """Return what takes the place of a parameter in a sharded state dict.

    After loading, a tensor without memory stands for the parameter, whose shard has been loaded.
    """
    param = base.data
    first, kept = param.storage_offset(), store.shard_range
    inside = range(max(first, kept.start), min(first + param.numel(), kept.stop))
    stands_for = torch.empty(param.shape, dtype=param.dtype, device="meta")
    if len(inside) == 0:
        return LocalNonpersistentObject(stands_for)
    span = range(inside.start - first, inside.stop - first)
    pieces = cut_into_pieces(base, span)
    assert pieces is not None, "the whole parameter can be cut"
    flat = cut(store.shard, inside, kept.start)

    def build(key: str, data: Any, replica_id: Any, flattened_range: Any) -> dict[str, ShardedTensor]:
        return sharded_pieces(pieces, "", flat, span.start, (*base.replica_id[:2], _copy_number(store)))

    def merge(read: dict[str, Tensor]) -> Tensor:
        for number, piece in enumerate(pieces):
            target, values = cut(flat, piece.span, span.start), read[f"{number:03d}"]
            if target.data_ptr() != values.data_ptr():  # otherwise it was read in place
                target.copy_(values.reshape(-1))
        return stands_for

    return ShardFactory(base.key, param, build, merge, base.replica_id, whole=base)


def _copy_number(store: ParamStore) -> int:
    """Return which copy of its shard this rank has, among the ranks that keep the same one."""
    groups = store.sharding.groups
    return groups.logical(store.sharding.member) % (groups.ranks // groups.shards(store.level))
