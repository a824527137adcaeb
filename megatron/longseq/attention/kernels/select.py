"""Selection of the fastest kernel for some tensors, and the reason for it."""

import functools
import importlib.util
import logging
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core.utils import log_single_rank
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.kernels.flash_cuda import (
    HEAD_DIM_LIMIT,
    HEAD_DIM_STEP,
    FlashAttn,
    FlashAttn3,
    TorchCudaFlash,
    load_flash_attn,
    load_flash_attn_3,
)
from megatron.longseq.attention.kernels.merge import merge_
from megatron.longseq.attention.kernels.reference import Reference
from megatron.longseq.attention.kernels.torch_cpu import CpuFlash

logger = logging.getLogger(__name__)

# What Triton raises without a C compiler, without Python's headers or without the driver's library.
CANNOT_COMPILE = (RuntimeError, OSError, AssertionError, subprocess.SubprocessError)
HOPPER = 9  # major compute capability of the devices for which FlashAttention 3 is made

Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]  # see `merge.merge_`


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """What a kernel has to support.

    Attributes:
        device: type of the device: "cpu", "cuda", ...
        dtype: type of q, k and v.
        head_dim: head size of q and k.
        value_dim: head size of v.
        dropout: probability of dropping an attention weight.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    dropout: float


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """A kernel, and one line that says why this one was selected."""

    kernel: Kernel
    why: str


def select_kernel(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    value_dim: int | None = None,
    dropout: float = 0.0,
    only: str | None = None,
    backend: str = "auto",
) -> KernelChoice:
    """Return the fastest kernel that supports the tensors. Warn if only the reference does.

    Args:
        device: device of the tensors.
        dtype: type of q, k and v.
        head_dim: head size of q and k.
        value_dim: head size of v; None: that of q and k.
        dropout: probability of dropping an attention weight, which only the reference supports.
        only: name of the only kernel to consider; None: all.
        backend: upstream's --attention-backend. "flash" excludes the reference; "unfused" and "local" take only the
            reference, which stores the scores as upstream's attention of these names does. There is no kernel of
            cuDNN, so "fused" chooses like "auto".

    Raises:
        ValueError: `only` names no kernel, or no kernel that may be taken supports the tensors; or the type is no
            float type.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"attention tensors have dtype {dtype}; give a floating-point dtype")
    need = KernelRequest(device.type, dtype, head_dim, value_dim or head_dim, dropout)
    candidates = {name: entry for name, entry in _CANDIDATES.items() if only in (None, name)}
    if not candidates:
        raise ValueError(f"there is no attention kernel {only!r}; give one of {', '.join(_CANDIDATES)}")
    against: list[str] = []
    if backend != "auto":
        candidates = {name: entry for name, entry in candidates.items() if _backend_allows(backend, name)}
        note = ", but this attention has no kernel of cuDNN" if backend == "fused" else ""
        against.append(f"--attention-backend {backend}{note}")
    for name, (obstacle, make) in candidates.items():
        reason = obstacle(need)
        if reason is None:
            why = f"attention kernel {name}" + (f" ({'; '.join(against)})" if against else "")
            if name == Reference.name and only is None and not dropout:
                warnings.warn(f"{why}: it is slow and stores the whole score matrix", stacklevel=2)
            return KernelChoice(make(need), why)
        against.append(f"not {name}: {reason}")
    raise ValueError(
        f"no attention kernel can compute this: {'; '.join(against)}; the kernels are {', '.join(_CANDIDATES)}"
    )


def _backend_allows(backend: str, kernel: str) -> bool:
    """Return whether upstream's --attention-backend lets a kernel be taken."""
    return {"flash": kernel != Reference.name, "fused": True}.get(backend, kernel == Reference.name)


def _against_flash(need: KernelRequest) -> str | None:
    """Return why no flash kernel supports a request; None if nothing speaks against it."""
    if need.dropout:
        return f"it has no attention dropout ({need.dropout} is requested)"
    if need.value_dim != need.head_dim:
        return f"values of {need.value_dim} beside keys of {need.head_dim}"
    return None


def _against_cpu(need: KernelRequest) -> str | None:
    if need.device != "cpu":
        return f"device {need.device}"
    if need.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"{need.dtype}"
    return _against_flash(need)


def _against_cuda(need: KernelRequest) -> str | None:
    if need.device != "cuda":
        return f"device {need.device}"
    if need.dtype not in (torch.bfloat16, torch.float16):
        return f"{need.dtype}"
    if need.head_dim % HEAD_DIM_STEP or need.head_dim > HEAD_DIM_LIMIT:
        return f"head size {need.head_dim} is not a multiple of {HEAD_DIM_STEP} up to {HEAD_DIM_LIMIT}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the device is older than Ampere"
    return _against_flash(need)


def _against_package(need: KernelRequest) -> str | None:
    return _against_cuda(need) or _against_module("flash_attn", load_flash_attn)


def _against_package_3(need: KernelRequest) -> str | None:
    reason = _against_cuda(need)
    if reason is None and torch.cuda.get_device_capability()[0] != HOPPER:
        reason = "the device is no Hopper"
    return reason or _against_module("flash_attn_interface", load_flash_attn_3)


def _against_module(name: str, load: Callable[[], Any]) -> str | None:
    """Return why the functions of a package cannot be used."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        load()
    except ImportError as error:
        return str(error)
    return None


_CANDIDATES: dict[str, tuple[Callable[[KernelRequest], str | None], Callable[[KernelRequest], Kernel]]] = {
    FlashAttn3.name: (_against_package_3, lambda need: FlashAttn3()),
    FlashAttn.name: (_against_package, lambda need: FlashAttn()),
    TorchCudaFlash.name: (_against_cuda, lambda need: TorchCudaFlash()),
    CpuFlash.name: (_against_cpu, lambda need: CpuFlash()),
    Reference.name: (lambda need: None, lambda need: Reference(dropout=need.dropout)),
}


class MergeChoice(NamedTuple):
    """Function that merges a block's result into the running one, and one line that says why this one was selected."""

    function: Merge
    why: str


@functools.cache
def select_merge(device_type: str) -> MergeChoice:
    """Return the fastest merge on a type of device: fused by Triton on a GPU, else PyTorch's operators.

    Triton compiles at the first call. Where it cannot, that call warns, and the merge is by PyTorch's operators.
    """
    if device_type != "cuda":
        return MergeChoice(merge_, f"merge by PyTorch's operators (device {device_type})")
    try:
        from megatron.longseq.attention.kernels.merge_triton import fused_merge_
    except ImportError as error:
        return MergeChoice(merge_, f"merge by PyTorch's operators (not fused: {error})")
    return MergeChoice(_falling_back(fused_merge_), "fused merge by Triton")


def _falling_back(fused: Merge) -> Merge:
    """Return a fused merge that is replaced by `merge_` if its first call cannot be compiled, which changes nothing."""
    chosen: list[Merge] = []

    def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, rows: Tensor | None = None) -> None:
        if not chosen:
            try:
                fused(out, lse, block_out, block_lse, rows)
            except CANNOT_COMPILE as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                warnings.warn(f"merge by PyTorch's operators, because Triton cannot compile: {reason}", stacklevel=2)
                chosen.append(merge_)
            else:
                chosen.append(fused)
                return
        chosen[0](out, lse, block_out, block_lse, rows)

    return merge


@dataclass
class KernelSelector:
    """Selects kernels and caches them by their requests. Every selection is logged once.

    Attributes:
        owner: what the kernels are for, in the log.
        kernels: selected kernels.
    """

    owner: str
    kernels: dict[Any, Kernel] = field(default_factory=dict)

    def select(self, query: Tensor, value: Tensor, backend: str, dropout: float = 0.0) -> Kernel:
        """Return the kernel for a query and a value tensor [s, b, h, d]; see `select_kernel`.

        Args:
            query, value: [s, b, h, d]; only device, dtype and head sizes are read.
            backend: upstream's --attention-backend.
            dropout: probability of dropping an attention weight.

        Raises:
            ValueError: No kernel supports the tensors.
        """
        key = (query.device, query.dtype, query.shape[-1], value.shape[-1], dropout, backend)
        if key not in self.kernels:
            choice = select_kernel(*key[:3], value_dim=key[3], dropout=dropout, backend=backend)
            level = logging.WARNING if choice.kernel.name == Reference.name else logging.INFO
            log_single_rank(logger, level, f"{self.owner}: {choice.why}; {select_merge(query.device.type).why}")
            self.kernels[key] = choice.kernel
        return self.kernels[key]
