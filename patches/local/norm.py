"""PyTorch's LayerNorm and RMSNorm under sequence parallelism."""

import copy
from collections.abc import Callable
from typing import Any

import torch


def marked_for_sequence_parallel(original: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """Wrap `WrappedTorchNorm.__new__`: build the norm, then mark its weights as upstream's gradient sum expects.

    Each tensor-parallel rank normalises its own part of the sequence, so the weights' gradients are partial there;
    upstream sums those of parameters that carry `sequence_parallel = True`.
    """

    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    return __new__
