"""Upstream's distributed optimizer where gradients or parameters are not whole buffers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import Range

from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.bucket_storage import ParamStore
from megatron.longseq.sharding.runtime.ddp import ShardedDataParallel
from megatron.longseq.sharding.runtime.restore import matching_weights


def adopt(optimizer: Any) -> None:
    """Have upstream's optimizer read the gradients, and write the parameters, that this rank keeps.

    Upstream finds an element by its place in a parameter or in a whole bucket; here places begin where this rank's
    part does.
    """
    if optimizer.is_stub_optimizer:
        return
    chunks = list(optimizer.model_chunks)
    optimizer.start_param_sync_for_bucket_group_subset = lambda: _sync_all(chunks)
    _around(
        optimizer, "load_parameter_state_from_fully_reshardable", lambda: matching_weights(optimizer, _stores(chunks))
    )
    strategy = chunks[0].sharding.strategy
    if strategy.grads is not Level.NONE:
        _around(optimizer, "_copy_model_grads_to_main_grads", lambda: _rebased(optimizer, "param", _all_of_it))
    if strategy.params is not Level.NONE:
        _point_at_parts(optimizer, chunks)
        _around(optimizer, "_copy_main_params_to_model_params", lambda: _writing_parts(optimizer, chunks))


def _send_all(chunks: list[ShardedDataParallel]) -> None:
    """Start sending all buckets' new parameters, in the order in which the next forward reads them."""
    for chunk in chunks:
        for group in reversed(chunk.bucket_groups):
            if not group.param_gather_dispatched:
                group.store.sync(group.label)
                group.param_gather_dispatched = True


def _sync_all(chunks: list[ShardedDataParallel]) -> None:
    """Send all buckets' new parameters; parts that are gathered for every use are waited for there."""
    _send_all(chunks)
    for chunk in chunks:
        for group in chunk.bucket_groups:
            if group.store.level is Level.NONE:
                group.store.finish_sync()


def _around(optimizer: Any, name: str, context: Callable[[], Any]) -> None:
    """Re-bind a method on the optimizer to run in a context."""
    method = getattr(optimizer, name)

    @wraps(method)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with context():
            return method(*args, **kwargs)

    setattr(optimizer, name, inside)


def _all_of_it(param: torch.nn.Parameter, span: Any) -> Any:
    """A gradient is what this rank owns of it (`ShardedBucketGroup`)."""
    return Range(0, span.size)


@contextmanager
def _rebased(optimizer: Any, kind: str, place: Callable[[torch.nn.Parameter, Any], Any]) -> Iterator[None]:
    """Let a parameter's places of a kind be those in what this rank holds."""
    find = optimizer._get_model_param_range_map

    def rebased(param: torch.nn.Parameter) -> dict[str, Any]:
        found = find(param)
        return {**found, kind: place(param, found[kind])}

    optimizer._get_model_param_range_map = rebased
    try:
        yield
    finally:
        optimizer._get_model_param_range_map = find


@contextmanager
def _writing_parts(optimizer: Any, chunks: list[ShardedDataParallel]) -> Iterator[None]:
    """Let upstream write into this rank's parts, and send them at once, whatever upstream overlaps.

    The first unit is gathered before upstream's own hook would send.
    """
    stores = _stores(chunks)
    groups = [group for chunk in chunks for group in chunk.bucket_groups]
    wholes = [group.bucket.param_data for group in groups]

    def place(param: torch.nn.Parameter, span: Any) -> Any:
        first = stores[param].held.start
        return Range(span.start - first, span.end - first)

    for chunk in chunks:
        chunk.release_all()
    for group in groups:
        group.bucket.param_data = group.store.part
    try:
        with _rebased(optimizer, "gbuf_world_in_bucket", place):
            yield
    finally:
        for group, whole in zip(groups, wholes, strict=True):
            group.bucket.param_data = whole
    _send_all(chunks)


def _stores(chunks: list[ShardedDataParallel]) -> dict[torch.nn.Parameter, ParamStore]:
    return {param: group.store for chunk in chunks for group in chunk.bucket_groups for param in group.params}


def _point_at_parts(optimizer: Any, chunks: list[ShardedDataParallel]) -> None:
    """Let main parameters that are views of float32 parameters be views of this rank's parts."""
    stores = _stores(chunks)
    for params, shards in zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True):
        for param, shard in zip(params, shards, strict=True):
            span = optimizer._get_model_param_range_map(param)["gbuf_world_in_bucket"]
            store = stores[param]
            shard.data = store.part[span.start - store.held.start : span.end - store.held.start]
