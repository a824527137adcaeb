"""Which kernel runs, and why."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.kernels.flash_cuda import (
    HEAD_DIM_LIMIT,
    HEAD_DIM_STEP,
    FlashAttn,
    TorchCudaFlash,
    load_flash_attn,
)
from megatron.longseq.attention.kernels.reference import Reference
from megatron.longseq.attention.kernels.torch_cpu import CpuFlash


@dataclass(frozen=True, slots=True)
class Need:
    """What a kernel is wanted for.

    Attributes:
        device: "cpu", "cuda", ...
        dtype: of q, k and v.
        head_dim: of q and k.
        value_dim: of v.
        dropout: probability of dropping an attention weight.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    dropout: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel, and one line that says why it and not another."""

    kernel: Kernel
    why: str


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    value_dim: int | None = None,
    dropout: float = 0.0,
    only: str | None = None,
) -> Choice:
    """Return the fastest kernel that can do it; warn where only the reference can.

    Args:
        device: where the tensors are.
        dtype: of q, k and v.
        head_dim: of q and k.
        value_dim: of v; None: as of q and k.
        dropout: probability of dropping an attention weight; the reference alone has it.
        only: the name of the one kernel that may be taken.

    Raises:
        ValueError: `only` names no kernel, or one that cannot do it; or the type is no float type.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"attention of {dtype} tensors: give a float type")
    need = Need(device.type, dtype, head_dim, value_dim or head_dim, dropout)
    candidates = {name: entry for name, entry in _CANDIDATES.items() if only in (None, name)}
    if not candidates:
        raise ValueError(f"no attention kernel is called {only!r}: {', '.join(_CANDIDATES)}")
    against: list[str] = []
    for name, (obstacle, make) in candidates.items():
        reason = obstacle(need)
        if reason is None:
            why = f"attention kernel {name}" + (f" ({'; '.join(against)})" if against else "")
            if name == Reference.name and only is None and not dropout:
                warnings.warn(f"{why}: holds the whole score matrix, slow and large", stacklevel=2)
            return Choice(make(need), why)
        against.append(f"not {name}: {reason}")
    raise ValueError(f"{'; '.join(against)}; the kernels are {', '.join(_CANDIDATES)}")


def _against_flash(need: Need) -> str | None:
    """Return what keeps every flash kernel from it."""
    if need.dropout:
        return f"no attention dropout ({need.dropout} asked)"
    if need.value_dim != need.head_dim:
        return f"values of {need.value_dim} beside keys of {need.head_dim}"
    return None


def _against_cpu(need: Need) -> str | None:
    if need.device != "cpu":
        return f"device {need.device}"
    if need.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"{need.dtype}"
    return _against_flash(need)


def _against_cuda(need: Need) -> str | None:
    if need.device != "cuda":
        return f"device {need.device}"
    if need.dtype not in (torch.bfloat16, torch.float16):
        return f"{need.dtype}"
    if need.head_dim % HEAD_DIM_STEP or need.head_dim > HEAD_DIM_LIMIT:
        return f"head size {need.head_dim} is no multiple of {HEAD_DIM_STEP} up to {HEAD_DIM_LIMIT}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the device is older than Ampere"
    return _against_flash(need)


def _against_package(need: Need) -> str | None:
    reason = _against_cuda(need)
    if reason:
        return reason
    if importlib.util.find_spec("flash_attn") is None:
        return "not installed"
    try:
        load_flash_attn()
    except ImportError as error:
        return str(error)
    return None


_CANDIDATES: dict[str, tuple[Callable[[Need], str | None], Callable[[Need], Kernel]]] = {
    FlashAttn.name: (_against_package, lambda need: FlashAttn()),
    TorchCudaFlash.name: (_against_cuda, lambda need: TorchCudaFlash()),
    CpuFlash.name: (_against_cpu, lambda need: CpuFlash()),
    Reference.name: (lambda need: None, lambda need: Reference(dropout=need.dropout)),
}
