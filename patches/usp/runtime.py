"""State of context parallelism: made with upstream's process groups, used where attention is built."""

import functools
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from patches.conditions import has_local_layers
from patches.engine import session


def current_context() -> Any:
    """Return the `ContextParallel` of this process.

    Raises:
        RuntimeError: attention is built before upstream has created its groups.
    """
    context = session.SESSION.state.get("usp.groups") or session.SESSION.state.get("flexsp.attention")
    if context is None:
        raise RuntimeError("context parallelism: attention was built before initialize_megatron; call that first")
    return context


def with_context_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `initialize_megatron`: afterwards, create the process groups of the all-to-all and of the ring."""

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.training import get_args

        flags = get_args()
        sizes = flags.hierarchical_context_parallel_sizes
        # Upstream's hierarchical groups are for TransformerEngine's attention, and need einops. A layer spec of the
        # script's own may build that attention, which segments then replace.
        if flags.spec is None or has_local_layers(flags):
            flags.hierarchical_context_parallel_sizes = None
        try:
            finish = original(*args, **kwargs)
        finally:
            flags.hierarchical_context_parallel_sizes = sizes
        if callable(finish):  # with --lazy-mpu-init the caller connects the ranks later, by this function
            return with_context_groups(finish)
        if parallel_state.model_parallel_is_initialized():
            session.SESSION.state["usp.groups"] = _open(flags)
        return finish

    return initialize_megatron


def _open(flags: Namespace) -> Any:
    from megatron.core import parallel_state

    from megatron.longseq.attention.module import ContextParallel
    from megatron.longseq.attention.plan.comm_type import comm_types
    from megatron.longseq.attention.runtime.comm import GroupCollectives
    from megatron.longseq.attention.runtime.packed_documents import MaskReader
    from megatron.longseq.attention.runtime.process_groups import open_strategies, reorder_context_group

    timeout = timedelta(minutes=flags.distributed_timeout_minutes)
    types, group = comm_types(flags), parallel_state.get_context_parallel_group()
    if flags.context_parallel_placement != "head-first":
        group = reorder_context_group(group, types["a2a+p2p"].mesh, timeout)
        parallel_state._CONTEXT_PARALLEL_GROUP = group
    stages = flags.pipeline_model_parallel_size * (flags.virtual_pipeline_model_parallel_size or 1)
    return ContextParallel(
        open_strategies(group, types, flags.ring_window, timeout),
        MaskReader(GroupCollectives(group), group.rank(), needs_mask=flags.reset_attention_mask, stages=stages),
    )


def with_chosen_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LocalSpecProvider.core_attention`: local layers get ours, or TransformerEngine's where it was asked for."""

    def core_attention(self: Any) -> Any:
        from megatron.training import get_args

        from megatron.longseq.flexsp.arguments import wants_flexsp
        from patches.usp.conditions import spreads_attention

        if spreads_attention(get_args()) or wants_flexsp(get_args()):
            return _our_attention()
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention

    return core_attention


def with_our_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `TESpecProvider.core_attention`: TransformerEngine's layers get `LongSequenceAttention`."""

    def core_attention(self: Any) -> Any:
        return _our_attention()

    return core_attention


def _our_attention() -> Callable[..., Any]:
    from megatron.longseq.attention.module import LongSequenceAttention

    return functools.partial(LongSequenceAttention, context=current_context)


def refusing_other_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Attention.__init__`: refuse a core attention other than ours over context-parallel or flexible ranks.

    A model of several parts may turn context parallelism off in the configuration of one of them, which keeps its own.

    Raises:
        ValueError: Names the layer and its core attention.
    """

    def spreads(config: Any) -> bool:
        return config.context_parallel_size > 1 or "flexsp.attention" in session.SESSION.state

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from megatron.longseq.attention.module import LongSequenceAttention

        original(self, *args, **kwargs)
        core = self.core_attention
        if spreads(self.config) and not isinstance(core, LongSequenceAttention):
            raise ValueError(
                f"layer {self.layer_number}: its layer spec names {type(core).__name__}, but attention over "
                "ranks is ours. Let the spec take the core attention of upstream's spec provider "
                "(get_backend(...).core_attention()), or with --context-parallel-size give "
                "--context-parallel-attention transformer_engine."
            )

    return __init__


def with_recompute_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `checkpoint(function, distribute_saved_activations, *inputs)`: the function keeps attention's results."""

    def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
        return original(current_context().recompute_cache.wrap(function), *args)

    return checkpoint
