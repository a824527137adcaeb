"""Create every tensor on the meta device: it has a size and a dtype, but no memory and no values."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

# By name, because on a CPU `torch.empty` is a function around PyTorch's.
FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "arange", "tensor", "empty_strided"}


class TensorsOnMeta(TorchFunctionMode):
    """Create tensors on the meta device, and leave there those that are moved to a GPU.

    A tensor of one number, such as the kind of mask that upstream hands to recomputed attention, can be read again.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "type" and len(args) == 1 and not kwargs:  # upstream tells parameter types apart by it
            return f"torch.cuda.{func(*args).rpartition('.')[2]}"
        if name == "item" and hasattr(args[0], "known_number"):
            return args[0].known_number
        if name in FACTORIES or (kwargs.get("device") is not None and func is not torch.Generator):
            kwargs["device"] = torch.device("meta")
        result = func(*args, **kwargs)
        if name == "tensor" and (number := _only_number(args)) is not None:
            result.known_number = number
        return result


def _only_number(args: Sequence[Any]) -> int | float | None:
    """Return the number of `torch.tensor(number)` or `torch.tensor([number])`, or None for other arguments."""
    data = args[0] if args else None
    if isinstance(data, list | tuple) and len(data) == 1:
        data = data[0]
    return data if isinstance(data, int | float) else None


@contextmanager
def single_process() -> Iterator[None]:
    """Let object collectives return this process's own object for every rank, and send no messages.

    torch's fake process groups run every other collective on the meta device; they do nothing.
    """

    def all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    def broadcast_object_list(objects: list[Any], *_: Any, **__: Any) -> None:
        """Leave the list as it is."""

    def batch_isend_irecv(operations: list[Any]) -> list[Any]:
        return []

    twins = {
        "all_gather_object": all_gather_object,
        "broadcast_object_list": broadcast_object_list,
        "batch_isend_irecv": batch_isend_irecv,
    }
    before = {name: getattr(dist, name) for name in twins}
    for name, twin in twins.items():
        setattr(dist, name, twin)
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(dist, name, original)
