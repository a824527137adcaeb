"""The sharding state of this process, from where upstream makes its groups to where it wraps models."""

import functools
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from patches.engine import session

ONE_QUEUE = (
    "> PaRO: with CUDA_DEVICE_MAX_CONNECTIONS=1, which upstream requires with tensor or context parallelism before "
    "Blackwell, a collective that waits for another one also holds up compute. Leave it unset where neither is used"
)


def current_sharding() -> Any:
    """Return the `ShardingState` of this process.

    Raises:
        RuntimeError: a model is wrapped before upstream has created its groups.
    """
    found = session.SESSION.state.get("paro.groups")
    if found is None:
        raise RuntimeError("--paro: a model is wrapped before initialize_megatron has run; call that first")
    return found


def with_sharding_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `initialize_megatron`: afterwards, create the strategy's process groups and queues."""

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.training import get_args

        finish = original(*args, **kwargs)
        if callable(finish):  # with --lazy-mpu-init the caller connects the ranks later, by this function
            return with_sharding_groups(finish)
        if parallel_state.model_parallel_is_initialized():
            session.SESSION.state["paro.groups"] = _open(get_args())
        return finish

    return initialize_megatron


def of_one_copy(original: Callable[..., float]) -> Callable[..., float]:
    """Wrap `calc_params_l2_norm`: if several ranks hold equal main parameters, only those of one rank count."""

    def calc_params_l2_norm(model: Any, *args: Any, **kwargs: Any) -> float:
        if current_sharding().optimizer_groups.replicas.rank() == 0:
            return original(model, *args, **kwargs)
        chunks = model if isinstance(model, list) else [model]
        params = [p for chunk in chunks for p in chunk.parameters() if getattr(p, "main_param_sharded", False)]
        mains = [param.main_param for param in params]
        for param in params:
            param.main_param = None  # as on a rank that holds no part of it: it adds nothing
        try:
            return original(model, *args, **kwargs)
        finally:
            for param, main in zip(params, mains, strict=True):
                param.main_param = main

    return calc_params_l2_norm


def _open(args: Namespace) -> Any:
    """Create the sharding state; every rank of the job at the same time."""
    import torch
    from megatron.core import parallel_state

    from megatron.longseq.distributed import same_backend_options
    from megatron.longseq.sharding.arguments import prefetch_units
    from megatron.longseq.sharding.plan.collectives import CollectivesMode
    from megatron.longseq.sharding.plan.flat_or_hierarchical import flat_chooser, given_links
    from megatron.longseq.sharding.plan.from_args import sharding_plan
    from megatron.longseq.sharding.runtime.comm_queue import CommQueues
    from megatron.longseq.sharding.runtime.comm_streams import comm_queue_for
    from megatron.longseq.sharding.runtime.gloo_ring import runner_for
    from megatron.longseq.sharding.runtime.process_groups import open_groups, open_optimizer_groups
    from megatron.longseq.sharding.runtime.state import ShardingState
    from patches.environment import has_one_queue

    plan = sharding_plan(args)
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
    communicators = open_groups(data_parallel, plan.groups, timeout)
    runner = runner_for(plan.groups, communicators, average=args.ddp_average_in_collective)
    device = torch.zeros(0, device=torch.cuda.current_device()).device
    is_overlapped = plan.collectives is CollectivesMode.OVERLAPPED
    options = same_backend_options(data_parallel)
    make = functools.partial(comm_queue_for, is_urgent=options is not None and options.is_high_priority_stream)
    queues = CommQueues(runner, device, torch.distributed.get_rank(), is_overlapped=is_overlapped, make=make)
    if torch.distributed.get_rank() == 0:
        if is_overlapped:
            inside, between = plan.links
            print(f"> PaRO: --paro-links {inside:g} {between:g} (GB/s inside groups and between them)", flush=True)
        if device.type == "cuda" and has_one_queue():
            print(ONE_QUEUE, flush=True)
    return ShardingState(
        plan.strategy,
        plan.groups,
        communicators.member,
        queues,
        open_optimizer_groups(data_parallel, plan.groups, plan.strategy.optimizer, timeout),
        is_flat=flat_chooser(plan.collectives, plan.groups, given_links(*plan.links, plan.groups)),
        comm_dtype=torch.bfloat16 if args.paro_wire == "bf16" and args.accumulate_allreduce_grads_in_fp32 else None,
        passes=args.seq1f1b_splits,
        overlaps_grads=args.overlap_grad_reduce,
        prefetch_units=prefetch_units(args),
        sent=runner.sent,
        initial_group=data_parallel if args.data_parallel_random_init else None,
    )
