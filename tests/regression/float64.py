"""Run upstream in double precision, by replacing every float32 by float64.

Upstream has no flag for it. It uses `torch.float32`, `.float()` and the default dtype. Replacing all three leaves no
single precision in the run, so that two layouts can be compared to 1e-9.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from patches.cpu.device import mode_in_backward


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _is_single(value: Any) -> bool:
    return value is torch.float32


class FloatMeansDouble(TorchFunctionMode):
    """Replace float32 by float64 in `dtype=torch.float32`, `x.float()` and `x.to(torch.float32)`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("Double", "Float")  # upstream's optimizers check for this name
        if any(map(_is_single, args)):
            args = tuple(map(_widened, args))
        if not kwargs:
            return func(*args)
        return func(*args, **{name: _widened(value) for name, value in kwargs.items()})


@contextmanager
def _files_as_they_are() -> Iterator[None]:
    """Load stored tensors in their own dtype. A float32 checkpoint is then copied into float64 weights."""
    load = torch.load

    def load_as_stored(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return load(*args, **kwargs)

    torch.load = load_as_stored
    try:
        yield
    finally:
        torch.load = load


@contextmanager
def double_precision() -> Iterator[None]:
    """Run in float64 until the context closes."""
    mode = FloatMeansDouble()
    torch.set_default_dtype(torch.float64)
    try:
        with _files_as_they_are(), mode_in_backward(mode), mode:
            yield
    finally:
        torch.set_default_dtype(torch.float32)
