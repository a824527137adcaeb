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

from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.bucket_storage import ParamStore
from megatron.longseq.sharding.runtime.pieces import Piece, cut_into_pieces, sharded_pieces


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


def hook_state_dicts(
    model: torch.nn.Module,
    stores: Mapping[torch.nn.Parameter, ParamStore],
    gather_all: Callable[[], None],
    release_all: Callable[[], None],
) -> None:
    """Let upstream's checkpoints read and write shards, and gather parameters for plain state dicts.

    Args:
        model: that upstream asks for its state dict.
        stores: of its sharded parameters.
        gather_all: gathers all parameters of the model.
        release_all: releases what is gathered.
    """
    original = model.sharded_state_dict
    loaded: list[str] = []

    def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
        state = original(*args, **kwargs)
        for name, base in state.items():
            store = stores.get(getattr(base, "data", None)) if isinstance(base, ShardedBase) else None
            if store is not None:
                store.wait()  # a sync after the last step may still write the shard
                state[name] = _shards(base, store)
        return state

    def before_loading(_module: Any, state_dict: dict[str, Any], *_unused: Any) -> None:
        loaded[:] = [name for name, value in state_dict.items() if isinstance(value, Tensor) and value.is_meta]
        if loaded:
            release_all()  # what is gathered is older than the shards
        else:
            gather_all()
        for name in loaded:
            del state_dict[name]

    def after_loading(_module: Any, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in loaded]
        if not loaded:
            for store in dict.fromkeys(stores.values()):
                store.copy_shard_from_full()

    model.sharded_state_dict = sharded_state_dict  # type: ignore[assignment]  # upstream unwraps a model before it calls this
    model.register_state_dict_pre_hook(lambda *unused: gather_all())
    model.register_load_state_dict_pre_hook(before_loading)
    model.register_load_state_dict_post_hook(after_loading)


def _shards(base: ShardedBase, store: ParamStore) -> Any:
    """Return what takes the place of a parameter in a sharded state dict.

    After loading, a tensor without memory stands for a parameter whose shard is loaded.
    """
    param = base.data
    assert isinstance(param, Tensor) and store.level is not Level.NONE
    first, kept = param.storage_offset(), store.shard_range
    inside = range(max(first, kept.start), min(first + param.numel(), kept.stop))
    shape, dtype = param.shape, param.dtype
    if len(inside) == 0:
        return LocalNonpersistentObject(torch.empty(shape, dtype=dtype, device="meta"))
    span = range(inside.start - first, inside.stop - first)
    pieces = cut_into_pieces(base, span)
    if pieces is None:
        raise ValueError(
            f"{getattr(base, 'key', 'a parameter')} of shape {tuple(shape)} cannot be saved while it is sharded, "
            "because upstream splits it along another dimension than the first. Give a triplet that starts with N."
        )
    flat = store.shard[inside.start - kept.start : inside.stop - kept.start]

    def build(key: str, data: Any, replica_id: Any, flattened_range: Any) -> dict[str, ShardedTensor]:
        return sharded_pieces(pieces, "", flat, span.start, (*base.replica_id[:2], _copy(store)))

    def merge(read: dict[str, Tensor]) -> Tensor:
        for number, piece in enumerate(pieces):
            _copy_into(flat, span, piece, read[f"{number:03d}"])
        return torch.empty(shape, dtype=dtype, device="meta")

    return ShardFactory(base.key, param, build, merge, base.replica_id, whole=base)


def _copy_into(flat: Tensor, span: range, piece: Piece, read: Tensor) -> None:
    target = flat[piece.span.start - span.start : piece.span.stop - span.start]
    if target.data_ptr() != read.data_ptr():  # otherwise it was read in place
        target.copy_(read.reshape(-1))


def _copy(store: ParamStore) -> int:
    """Return which copy of its shard this rank has, among the ranks that keep the same one."""
    groups = store.sharding.groups
    return groups.logical(store.sharding.member) % (groups.ranks // groups.shards(store.level))
