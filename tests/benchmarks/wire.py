"""Bytes that leave a rank, counted where torch.distributed's operators are called, whoever calls them."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_SILENT = ("barrier", "recv_", "wait_tensor", "_wrap_tensor_autograd")


class Counting(TorchDispatchMode):
    """Counts inside its context; what a rank keeps of a collective is not counted.

    Attributes:
        bytes: sent by this rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.bytes += _sent(func.namespace, func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))


def _sent(namespace: str, name: str, args: tuple[Any, ...]) -> int:
    if name in _SILENT:
        return 0
    if (namespace, name) == ("c10d", "send"):
        return sum(tensor.nbytes for tensor in args[0])
    if (namespace, name) == ("c10d", "alltoall_base_"):
        return _to_others(args[1], args[4], torch.distributed.ProcessGroup.unbox(args[2]))
    if (namespace, name) == ("_c10d_functional", "all_to_all_single"):
        tensor, _, splits, group = args
        return _to_others(tensor, splits, torch.distributed.distributed_c10d._resolve_process_group(group))
    if (namespace, name) == ("_c10d_functional", "all_gather_into_tensor"):
        tensor, ranks, _ = args
        return tensor.nbytes * (ranks - 1)
    if (namespace, name) == ("c10d", "_allgather_base_"):
        return args[0].nbytes - args[1].nbytes
    raise NotImplementedError(f"{namespace}::{name} is called in a benchmark that counts bytes: say what it sends")


def _to_others(tensor: torch.Tensor, splits: list[int], group: Any) -> int:
    """Return the bytes of a tensor that go to other ranks, by rows for each (none given: equal shares)."""
    rows = list(splits) or [tensor.shape[0] // group.size()] * group.size()
    return (sum(rows) - rows[group.rank()]) * (tensor.nbytes // tensor.shape[0])
