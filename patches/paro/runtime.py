"""The open sharding of this process, from where upstream makes its groups to where it wraps models."""

import functools
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from patches.engine import session

ONE_QUEUE = (
    "> PaRO: with CUDA_DEVICE_MAX_CONNECTIONS=1, which upstream asks for with tensor or context parallelism before "
    "Blackwell, a collective that waits for another one holds up compute, too. Leave it unset where neither is used"
)


def current_sharding() -> Any:
    """Return the `Sharding` of this process.

    Raises:
        RuntimeError: a model is wrapped before upstream has created its groups.
    """
    return _opened()[0]


def _opened() -> Any:
    found = session.SESSION.state.get("paro.groups")
    if found is None:
        raise RuntimeError("sharding (--paro): a model is wrapped before initialize_megatron has run")
    return found


def with_sharding_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `initialize_megatron`: afterwards, create the process groups of the strategy, and its queues."""

    @functools.wraps(original)
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


def with_shard_group(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap upstream's choice of groups for its wrapper, or for its optimizer: over which ranks a bucket is cut."""

    @functools.wraps(original)
    def setup_process_groups(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found, groups = original(*args, **kwargs), _opened()[1]
        found["intra_dp_cp_group"] = groups.shards
        found["inter_dist_opt_group"] = groups.replicas
        found["intra_dist_opt_group"] = groups.statistics
        if "intra_dp_cp_group_gloo" in found:
            found["intra_dp_cp_group_gloo"] = None  # in upstream's order, which is not that of shards
        return found

    return setup_process_groups


def with_bucket_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the making of a buffer: its memory comes bucket by bucket."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        import torch

        from megatron.longseq.sharding.runtime.buffers import BufferMemory, WithoutMemory

        device = torch.zeros(0, device=torch.cuda.current_device()).device
        self.longseq_memory = BufferMemory(current_sharding(), device)
        with WithoutMemory():
            original(self, *args, **kwargs)

    return __init__


def with_bucket_views(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the cutting of a view out of a buffer."""

    @functools.wraps(original)
    def _get(self: Any, shape: Any, start_index: int, buffer_type: Any) -> Any:
        return self.longseq_memory.view(self, shape, start_index, buffer_type)

    return _get


def with_sharded_wrapper(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the constructor of upstream's data-parallel wrapper, which is called in more than one place."""

    @functools.wraps(original)
    def __init__(
        self: Any,
        config: Any,
        ddp_config: Any,
        module: Any,
        disable_bucketing: bool = False,
        pg_collection: Any = None,
        full_param_layout: Any = None,
    ) -> None:
        from megatron.training import get_args

        from megatron.longseq.sharding.runtime.ddp import ShardedDataParallel

        sharding = current_sharding()
        size = get_args().ddp_bucket_size or max(40_000_000, 1_000_000 * sharding.groups.ranks)
        self.__class__ = ShardedDataParallel
        self.open(original, config, ddp_config, module, sharding, size, pg_collection)

    return __init__


def with_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the making of the distributed optimizer: it reads and writes what this rank keeps."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from megatron.longseq.sharding.runtime.optimizer import adopt

        original(self, *args, **kwargs)
        adopt(self)

    return __init__


def of_one_copy(original: Callable[..., float]) -> Callable[..., float]:
    """Wrap `calc_params_l2_norm`: if several ranks hold equal main parameters, only those of one rank count."""

    @functools.wraps(original)
    def calc_params_l2_norm(model: Any, *args: Any, **kwargs: Any) -> float:
        if _opened()[1].replicas.rank() == 0:
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


def _open(flags: Namespace) -> tuple[Any, Any]:
    import torch
    from megatron.core import parallel_state

    from megatron.longseq.distributed import same_backend_options
    from megatron.longseq.sharding.plan.flat_or_hierarchical import decide, given_links
    from megatron.longseq.sharding.plan.from_args import sharding
    from megatron.longseq.sharding.plan.ring import Mode
    from megatron.longseq.sharding.runtime.collectives import open_groups
    from megatron.longseq.sharding.runtime.comm_queue import Lanes
    from megatron.longseq.sharding.runtime.comm_streams import lane_for
    from megatron.longseq.sharding.runtime.gloo_ring import runner_for
    from megatron.longseq.sharding.runtime.process_groups import open_optimizer_groups
    from megatron.longseq.sharding.runtime.state import Sharding
    from megatron.longseq.sharding.tools.probe_links import probe
    from patches.environment import has_one_queue

    asked = sharding(flags)
    timeout = timedelta(minutes=flags.distributed_timeout_minutes)
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
    communicators = open_groups(data_parallel, asked.groups, timeout)
    runner = runner_for(asked.groups, communicators, average=flags.ddp_average_in_collective)
    device = torch.zeros(0, device=torch.cuda.current_device()).device
    mode, links = Mode(asked.collectives), None
    if mode is Mode.OVERLAPPED:  # measured while nothing else runs
        given = flags.paro_links
        links = given_links(*given, asked.groups) if given else probe(asked.groups, communicators, device)
        _tell(links, "given" if given else "measured")
    options = same_backend_options(data_parallel)
    make = functools.partial(lane_for, is_urgent=options is not None and options.is_high_priority_stream)
    lanes = Lanes(runner, device, torch.distributed.get_rank(), is_overlapped=mode is Mode.OVERLAPPED, make=make)
    if device.type == "cuda" and has_one_queue() and torch.distributed.get_rank() == 0:
        print(ONE_QUEUE, flush=True)
    opened = Sharding(
        asked.strategy,
        asked.groups,
        communicators.member,
        lanes,
        is_flat=decide(mode, asked.groups, links),
        wire=torch.bfloat16 if flags.paro_wire == "bf16" and flags.accumulate_allreduce_grads_in_fp32 else None,
        passes=flags.seq1f1b_splits,
        overlaps_grads=flags.overlap_grad_reduce,
        sent=runner.sent,
    )
    return opened, open_optimizer_groups(data_parallel, asked.groups, asked.strategy.optimizer, timeout)


def _tell(links: Any, origin: str) -> None:
    import torch

    if torch.distributed.get_rank() == 0:
        said = f"{links.inside.bandwidth / 1e9:.3g} GB/s inside groups, {links.between.bandwidth / 1e9:.3g} between"
        print(f"> PaRO: a rank's links, {origin}: {said}; a flat ring leaves a group by {links.channels}", flush=True)
