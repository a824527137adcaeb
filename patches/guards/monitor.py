"""Watch every rank for stalls, from the moment at which the ranks are connected."""

import contextlib
import functools
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from megatron.longseq.guards import arguments as conditions
from patches.engine import session
from patches.guards.runtime import current_guards

MONITOR = "guards.monitor"
STORE_SECONDS = 10.0


def with_stall_monitor(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `initialize_megatron`: once the ranks are connected, watch this one."""

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        finish = original(*args, **kwargs)
        if callable(finish):  # with --lazy-mpu-init the caller connects the ranks later, by this function
            return with_stall_monitor(finish)
        if MONITOR not in session.SESSION.state:
            monitor = _monitor(get_args())
            if monitor is not None:
                session.SESSION.state[MONITOR] = monitor
                monitor.start()
        return finish

    return initialize_megatron


def _monitor(args: Namespace) -> Any:
    import torch
    import torch.distributed as dist

    from megatron.longseq.guards.runtime.flight_record import record_file, write_record
    from megatron.longseq.guards.runtime.monitor import StallMonitor

    if not dist.is_initialized() or dist.get_backend() == "fake":
        return None
    in_steps, elsewhere = conditions.stall_limits(args)
    prepare: Callable[[], object] = lambda: None  # noqa: E731
    if torch.cuda.is_available():
        prepare = functools.partial(torch.cuda.set_device, torch.cuda.current_device())
    file = record_file(os.environ, getattr(args, "start_folder", None), dist.get_rank())
    is_recorded = file is not None and dist.get_backend() == "nccl"
    return StallMonitor(
        rank=dist.get_rank(),
        ranks=dist.get_world_size(),
        store=connect_to_store(os.environ),
        progress=current_guards().progress,
        in_steps=in_steps,
        elsewhere=elsewhere,
        on_gpu=torch.cuda.is_available(),
        record=functools.partial(write_record, file) if is_recorded else lambda: None,
        prepare=prepare,
    )


def connect_to_store(environment: Mapping[str, str]) -> Any:
    """Connect once more to the store of the job: a connection serves one thread at a time, and others may block.

    torchrun keeps the store when it restarts the ranks in place. Its keys are those of one start, so that ranks that
    have been restarted do not read the reports on which the ranks before them ended.

    Args:
        environment: of the process.

    Returns:
        The store, or None if this rank cannot reach it.
    """
    import torch.distributed as dist

    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not address or not port:
        return None
    with contextlib.suppress(RuntimeError, ValueError):  # the ranks met elsewhere; each reports for itself
        store = dist.TCPStore(
            address, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS)
        )
        return dist.PrefixStore(f"start {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return None
