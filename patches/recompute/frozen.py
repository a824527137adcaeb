"""Activation recomputation with frozen layers: a function whose inputs need no gradient runs without recomputation.

A recomputed function is one autograd node, whose backward runs only if one of its inputs needs a gradient. If none
does, parameters that are trained inside would get no gradient. So autograd records the function itself, and keeps
nothing if nothing inside is trained.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any


def recomputes(args: Namespace) -> bool:
    """Return whether upstream recomputes activations."""
    return getattr(args, "recompute_granularity", None) is not None


def unless_inputs_are_frozen(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `checkpoint(function, distribute_saved_activations, *inputs)`."""

    def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *inputs: Any) -> Any:
        if _are_frozen(inputs):
            return function(*inputs)
        return original(function, distribute_saved_activations, *inputs)

    return checkpoint


def kept_if_inputs_are_frozen(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `CheckpointWithoutOutput.checkpoint(run_function, *inputs)`."""

    def checkpoint(self: Any, run_function: Callable[..., Any], *inputs: Any) -> Any:
        if not _are_frozen(inputs):
            return original(self, run_function, *inputs)
        self.outputs = ()  # upstream then discards nothing and, without a `ctx`, recomputes nothing
        return run_function(*inputs)

    return checkpoint


def _are_frozen(inputs: Iterable[Any]) -> bool:
    """Return whether autograd records operations and no input needs a gradient."""
    import torch

    return torch.is_grad_enabled() and not any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
