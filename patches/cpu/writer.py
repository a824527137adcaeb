"""Upstream's process that writes checkpoints in the background, on a machine without CUDA."""

from collections.abc import Callable
from typing import Any


def without_cuda(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `PersistentAsyncCaller.async_loop`: return a function that a new process finds by its name."""
    async_loop.__wrapped__ = original  # type: ignore[attr-defined]
    return async_loop


def async_loop(*args: Any, **kwargs: Any) -> None:
    """Write checkpoints until the rank ends. Runs in a process without patches, which upstream starts."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from patches.cpu.device import cpu_stands_in_for_cuda

    with cpu_stands_in_for_cuda():
        PersistentAsyncCaller.async_loop(*args, **kwargs)
