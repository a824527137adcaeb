"""Upstream's model-parallel RNG tracker on the CPU's default generator."""

from typing import Any

import torch


def get_cpu_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """Return the default generator's state (a uint8 tensor; always a copy, so `clone` changes nothing)."""
    return torch.default_generator.get_state()


def set_cpu_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the default generator's state, at once."""
    torch.default_generator.set_state(new_state)
