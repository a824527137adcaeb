"""The sharded subclasses that take the place of upstream's wrapper, buffers and optimizer in all of its modules."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from megatron.core.distributed import distributed_data_parallel, param_and_grad_buffer
from megatron.core.optimizer import distrib_optimizer
from megatron.training import get_args

from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.ddp import ShardedBuffer, ShardedDataParallel
from megatron.longseq.sharding.runtime.initial_shards import layers_sharded_as_built
from megatron.longseq.sharding.runtime.optimizer import ShardedOptimizer
from patches.paro.runtime import current_sharding
from patches.record import is_upstream


class PatchedDataParallel(ShardedDataParallel):
    """`ShardedDataParallel` with the arguments of upstream's wrapper; the sharding state is that of the process.

    Args:
        config, ddp_config, module, pg_collection: as upstream's.
        disable_bucketing, full_param_layout: ignored; a strategy has buckets and a layout of its own.
    """

    def __init__(
        self,
        config: Any,
        ddp_config: Any,
        module: torch.nn.Module,
        disable_bucketing: bool = False,
        pg_collection: Any = None,
        full_param_layout: Any = None,
    ) -> None:
        sharding = current_sharding()
        bucket_size = get_args().ddp_bucket_size or max(40_000_000, 1_000_000 * sharding.groups.ranks)
        super().__init__(config, ddp_config, module, sharding, bucket_size, pg_collection)


def with_layers_sharded_as_built(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that builds a model and wraps it: shard the parts of each layer as soon as they are initialised.

    The model is built unsharded if it is not wrapped, or if hooks read its values before it is wrapped. A hook that
    does not read them says so by the attribute `reads_values = False`.
    """
    signature = inspect.signature(original)

    def build(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        builder = call.arguments.get("self")
        hooks = [] if builder is None else builder._model_config.pre_wrap_hooks
        reads_values = any(getattr(hook, "reads_values", True) for hook in hooks)
        is_whole = current_sharding().strategy.params is Level.NONE
        if is_whole or reads_values or not call.arguments["wrap_with_ddp"]:
            return original(*args, **kwargs)
        run = get_args()
        dtype = torch.half if run.fp16 else torch.bfloat16 if run.bf16 else None
        with layers_sharded_as_built(current_sharding(), dtype):
            return original(*args, **kwargs)

    return build


@contextmanager
def sharded_classes() -> Iterator[None]:
    """Bind the subclasses in upstream's modules; at the end bind upstream's classes again."""
    pairs: list[tuple[type, type]] = [
        (param_and_grad_buffer._ParamAndGradBuffer, ShardedBuffer),
        (distributed_data_parallel.DistributedDataParallel, PatchedDataParallel),
        (distrib_optimizer.DistributedOptimizer, ShardedOptimizer),
    ]
    _rebind({id(theirs): ours for theirs, ours in pairs})
    try:
        yield
    finally:  # also where a module has imported a subclass meanwhile
        _rebind({id(ours): theirs for theirs, ours in pairs})


def _rebind(classes: Mapping[int, type]) -> None:
    """Bind every name and keyword default that holds one of the classes, by its id, to the other class.

    Upstream imports these classes by name, and one function has one of them as its default, so all loaded modules of
    upstream are searched; modules that are loaded later import from them.
    """
    for module in [module for name, module in list(sys.modules.items()) if is_upstream(name)]:
        functions = [value for value in vars(module).values() if isinstance(value, FunctionType)]
        spaces = [vars(module), *(function.__kwdefaults__ for function in functions if function.__kwdefaults__)]
        for space in spaces:
            for name, value in list(space.items()):
                if id(value) in classes:
                    space[name] = classes[id(value)]
