"""Run upstream in double precision, by replacing every float32 by float64.

Upstream has no flag for it. It uses `torch.float32`, `.float()` and the default dtype. Replacing all three leaves no
single precision in the run, so that two layouts can be compared to 1e-9.
"""

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from patches.cpu.device import swapped

_SINGLE = torch.float32
torch.save(torch.empty(0), io.BytesIO())  # builds torch's tables from dtypes to the names in files

# What creates or converts tensors: these may get a `torch.float32` that was bound before.
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "tensor",
    "zeros",
    "zeros_like",
)
_METHODS = ("new_empty", "new_full", "new_ones", "new_zeros", "to")


def _widened(value: Any) -> Any:
    return torch.float64 if value is _SINGLE else value


def _in_double(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})

    return call


def _type_in_single(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Return `Tensor.type` that names single precision, for which upstream's optimizers look."""

    @functools.wraps(convert)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = convert(self, *args, **kwargs)
        return result if args or kwargs else result.replace("Double", "Float")

    return type_


def _as_stored(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.load` that keeps the dtype of the file: a float32 checkpoint is copied into float64 weights."""

    @functools.wraps(load)
    def load_as_stored(*args: Any, **kwargs: Any) -> Any:
        with swapped(torch, {"float32": _SINGLE, "float": _SINGLE}):
            return load(*args, **kwargs)

    return load_as_stored


@contextmanager
def double_precision() -> Iterator[None]:
    """Run in float64 until the context closes."""
    methods = {name: _in_double(getattr(torch.Tensor, name)) for name in _METHODS}
    methods |= {"float": torch.Tensor.double, "type": _type_in_single(torch.Tensor.type)}
    torch.set_default_dtype(torch.float64)
    try:
        with (
            swapped(torch, {name: _in_double(getattr(torch, name)) for name in _FACTORIES}),
            swapped(torch.Tensor, methods),
            swapped(torch, {"float32": torch.float64, "float": torch.float64, "load": _as_stored(torch.load)}),
        ):
            yield
    finally:
        torch.set_default_dtype(_SINGLE)
