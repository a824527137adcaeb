"""Refuse uses of parameters that are released: they have a size then, but no memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# What may be asked of a tensor without memory; `__get__` reads an attribute, such as its shape.
_OF_SIZES = {"__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_floating_point"}


class ReleasedParameters(TorchFunctionMode):
    """While it is active, an operation on a released parameter raises an error. Without it the process would crash.

    Args:
        chunks: the model chunks of this rank.
        strategy: sharding strategy, for the message.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], strategy: str) -> None:
        super().__init__()
        self.chunks, self.strategy = chunks, strategy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _OF_SIZES:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and _is_released(leaf):
                    raise RuntimeError(self._message(leaf))
        return func(*args, **(kwargs or {}))

    def _message(self, tensor: torch.Tensor) -> str:
        named = (pair for chunk in self.chunks for pair in chunk.named_parameters())
        shape = f"a parameter of shape {tuple(tensor.shape)}"
        name = next((f"the parameter {name}" for name, param in named if param is tensor), shape)
        return (
            f"the loss function reads {name}, but with --paro {self.strategy} parameters have memory only while their "
            "layer computes. Compute this term inside of the layer, or give a triplet that begins with N."
        )


def _is_released(tensor: torch.Tensor) -> bool:
    if not tensor.numel() or tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return False
    return tensor.untyped_storage().data_ptr() == 0
