"""Start upstream without CUDA."""

from collections.abc import Callable
from typing import Any

import torch


def allow_no_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `initialize_megatron`: pass upstream's own switch `allow_no_cuda=True`."""

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        if not args:  # the switch is upstream's first parameter: keep the value of a caller who passes it
            kwargs.setdefault("allow_no_cuda", True)
        return original(*args, **kwargs)

    return initialize_megatron


def without_trace(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that draws random numbers: restore the state of the generator afterwards."""

    def draw(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return original(*args, **kwargs)

    return draw
