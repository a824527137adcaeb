"""Shard a model while it is built, so that no rank ever holds all of its parameters.

Upstream builds a model module by module, and initialises every parameter as soon as it exists. Once a part of a
transformer layer (its attention, its MLP) is complete, a rank keeps its shard of the part and frees the rest. So the
random numbers are those of an unsharded start, and so are the weights. When the buckets are built, one after the other,
the parts of one bucket are gathered, moved into it and freed.

What is not part of a layer (embedding, output layer, final norm) is unsharded until its bucket is built.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch.nn.modules.module import register_module_module_registration_hook

from megatron.longseq.sharding.runtime.bucket_layout import lay_out
from megatron.longseq.sharding.runtime.bucket_storage import ParamStore
from megatron.longseq.sharding.runtime.state import ShardingState

Named = Sequence[tuple[str, torch.nn.Parameter]]
_BUILDER = "the builder"  # of a bucket, which gathers the parts of it


@contextmanager
def layers_sharded_as_built(sharding: ShardingState, dtype: torch.dtype | None) -> Iterator[None]:
    """Shard the parts of the transformer layers that are built inside.

    Args:
        sharding: of the job, with sharded parameters; it keeps the parts' shards.
        dtype: to which upstream converts the model after it is built; None: it does not.
    """

    def registered(parent: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
        if isinstance(parent, BaseTransformerLayer) and child is not None:
            _shard_part(child, sharding, dtype)

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _shard_part(part: torch.nn.Module, sharding: ShardingState, dtype: torch.dtype | None) -> None:
    params = [(name, param) for name, param in part.named_parameters() if param not in sharding.initial]
    device = torch.zeros(0, device=torch.cuda.current_device()).device
    for _, param in params:
        if param.is_floating_point():
            param.data = param.data.to(device=device, dtype=dtype or param.dtype)
    for store, held in store_params(params, sharding):
        sharding.initial.update(dict.fromkeys(held, store))


def store_params(params: Named, sharding: ShardingState) -> list[tuple[ParamStore, list[torch.nn.Parameter]]]:
    """Move parameters into stores of their own, one for each dtype, of which this rank keeps its shard.

    Args:
        params: names and parameters, unsharded.
        sharding: of the job, with sharded parameters.

    Returns:
        The stores, each with its parameters.
    """
    stores = []
    for dtype in {param.dtype: None for _, param in params}:
        of_type = [(name, param) for name, param in params if param.dtype == dtype]
        made = lay_out(of_type, sharding.groups.ranks, sum(param.numel() for _, param in of_type))
        store = ParamStore(sharding, made.bounds[-1][1], dtype, of_type[0][1].device)
        for _, param in of_type:
            first, end, _ = made.places[param]
            view = store.full.flat[first:end].view(param.shape)
            view.copy_(param.data)
            param.data = view
        store.keep_shard()
        stores.append((store, [param for _, param in of_type]))
    return stores


def gather_initial(params: Iterable[torch.nn.Parameter], sharding: ShardingState) -> None:
    """Gather the parts of these parameters, all ranks together; other parameters are unsharded already.

    Args:
        params: parameters to gather, in the same order on all ranks.
        sharding: of the job.
    """
    stores = _stores(params, sharding)
    for store in stores:
        store.gather(_BUILDER, is_pooled=False)
    for store in stores:
        store.wait()


def forget_initial(params: Iterable[torch.nn.Parameter], sharding: ShardingState) -> None:
    """Free what `gather_initial` has gathered: the parameters are in a bucket now.

    Args:
        params: the same parameters.
        sharding: of the job.
    """
    params = list(params)
    for store in _stores(params, sharding):
        store.release(_BUILDER)
    for param in params:
        sharding.initial.pop(param, None)


def _stores(params: Iterable[torch.nn.Parameter], sharding: ShardingState) -> list[ParamStore]:
    return list(dict.fromkeys(sharding.initial[param] for param in params if param in sharding.initial))


class WithoutValues:
    """Parameters that are sharded, while upstream makes views of them without reading their values.

    PyTorch makes no view of a tensor whose memory is released. So a tensor of the same shape with the memory of one
    element stands in for the values.
    """

    def __init__(self) -> None:
        self._values: dict[torch.nn.Parameter, torch.Tensor] = {}

    def hide(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Let other tensors stand in for the values of parameters."""
        for param in params:
            self._values[param] = param.data
            param.data = torch.empty((), dtype=param.dtype, device=param.device).expand(param.shape)

    def show(self) -> None:
        """Give the parameters their values back."""
        for param, values in self._values.items():
            param.data = values
        self._values.clear()
