"""Upstream's random numbers on the CPU's default generator, which stands in for CUDA's, too."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def get_cpu_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """Return the default generator's state (a uint8 tensor; always a copy, so `clone` changes nothing)."""
    return torch.default_generator.get_state()


def set_cpu_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the default generator's state, at once."""
    torch.default_generator.set_state(new_state)


def without_trace(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that draws from CUDA's generator: the CPU's is afterwards as it was."""

    @functools.wraps(original)
    def drawn_apart(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return original(*args, **kwargs)

    return drawn_apart
