"""Upstream's process that writes checkpoints in the background: neither it nor its rank outlives the other."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any


def with_watched_process(original: Callable[..., BaseProcess]) -> Callable[..., BaseProcess]:
    """Wrap the function of `PersistentAsyncCaller._get_process`: if the process dies, this rank ends with a message."""

    def _get_process(cls: Any, *args: Any, **named: Any) -> BaseProcess:
        is_new = cls._persistent_process is None
        process = original(cls, *args, **named)
        if is_new:
            watch(process, lambda: cls._persistent_process is process)
        return process

    return _get_process


def with_bound_process(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `PersistentAsyncCaller.async_loop`: return a function that a new process imports by its name."""
    async_loop.__wrapped__ = original  # type: ignore[attr-defined]
    return async_loop


def async_loop(*args: Any, **named: Any) -> None:
    """Write checkpoints until the rank ends. Runs in a process without patches, which upstream starts."""
    import torch
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from megatron.longseq.child_process import exit_with_parent
    from patches.cpu.device import cpu_stands_in_for_cuda

    exit_with_parent()
    # Upstream selects a CUDA device here without checking that there is one.
    with nullcontext() if torch.cuda.is_available() else cpu_stands_in_for_cuda():
        PersistentAsyncCaller.async_loop(*args, **named)


def watch(process: BaseProcess, is_in_use: Callable[[], bool]) -> None:
    """Start a thread that ends this rank if the process ends with an error while it is in use.

    The main thread cannot notice it: it may be waiting for the process without a limit. The launcher then ends the
    other ranks.

    Args:
        process: a child of this one.
        is_in_use: whether the run still needs the process.
    """
    is_ending = threading.Event()
    atexit.register(is_ending.set)  # Python ends its daemonic children afterwards

    def end_with_it() -> None:
        wait([process.sentinel])
        process.join()
        if process.exitcode == 0 or is_ending.is_set() or not is_in_use():
            return
        print(
            f"rank {os.environ.get('RANK', '0')}: the process that writes checkpoints in the background "
            f"(pid {process.pid}) ended with {_status(process.exitcode)}, so the save that it was writing cannot be "
            "committed. If the system killed it, the host has too little memory for a second copy of what a rank "
            "saves: leave out --async-save. Resume from the last complete checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    threading.Thread(target=end_with_it, name="checkpoint writer", daemon=True).start()


def _status(exit_code: int | None) -> str:
    return f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"status {exit_code}"
