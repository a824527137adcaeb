"""The other implementations of ring and hybrid attention, made to run without a GPU; nothing of them is copied here.

They call the flash-attn package, which needs CUDA. In its place they are given PyTorch's flash operator for CPUs, the
same one that ours calls, by a stand-in module with flash-attn's names. ring-flash-attn imports `transformers` for its
Hugging Face adapter alone, which is stood in for likewise. yunchang's ring of one rank sends its gradients to itself,
which gloo cannot: there they are copied. PyTorch's own ring refuses CPU operators through its public functions; the
private function behind them takes any operator.

In float32 the rings of yunchang and ring-flash-attn give wrong gradients: their sums start as the very buffers that the
next block writes to, for nothing is converted. It saves them the copies that right sums would be, about as many bytes
as the stand-in's results, which flash-attn would have written in place. In bfloat16 they are right.

    pip install "megatron-longseq[bench]"
"""

import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.attention.kernels.base import PackedLengths
from tests.benchmarks.attention_contest import RING_FLASH_ATTN, TORCH, YUNCHANG, Contestant
from tests.unit.flash_bed import Mask, flash_attn_2

VERSIONS = {YUNCHANG: "0.6.4", RING_FLASH_ATTN: "0.1.8"}

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def obstacle(who: str) -> str | None:
    """Return why a peer cannot take part, if it is a package and not the one that the benchmark is written for."""
    if who not in VERSIONS:
        return None
    try:
        found = importlib.metadata.version(who)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed; pip install "megatron-longseq[bench]"'
    return None if found == VERSIONS[who] else f"version {found} is installed, {VERSIONS[who]} is measured"


def peer(contestant: Contestant, group: dist.ProcessGroup) -> Attend:
    """Return a peer's causal attention of local [b, n, h, d] (PyTorch's: [b, h, n, d]) tensors.

    Args:
        contestant: one of the peers'.
        group: its ranks; every rank of the job must call, for groups are made.
    """
    return {YUNCHANG: _yunchang, RING_FLASH_ATTN: _ring_flash_attn, TORCH: _torch}[contestant.who](contestant, group)


def _yunchang(contestant: Contestant, group: dist.ProcessGroup) -> Attend:
    with _stand_ins():
        from yunchang import LongContextAttention, set_seq_parallel_pg
    mesh = contestant.mesh
    set_seq_parallel_pg(mesh.ulysses, mesh.ring, dist.get_rank(), dist.get_world_size())
    module = LongContextAttention(ring_impl_type=contestant.variant)  # keeps the groups made last
    return lambda q, k, v: module(q, k, v, causal=True)


def _ring_flash_attn(contestant: Contestant, group: dist.ProcessGroup) -> Attend:
    with _stand_ins():
        from ring_flash_attn import zigzag_ring_flash_attn_func
    return lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=group)


def _torch(contestant: Contestant, group: dist.ProcessGroup) -> Attend:
    return lambda q, k, v: _TorchRing.apply(q, k, v, group, contestant.variant)


class _TorchRing(torch.autograd.Function):
    """PyTorch's ring by its private functions, with load balance (the default), which is the zigzag."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, rotation: str) -> Tensor:
        from torch.distributed.tensor.experimental._context_parallel import _attention, set_rotate_method

        set_rotate_method(rotation)
        scale = q.shape[-1] ** -0.5
        out, lse = _attention._templated_ring_attention(
            group, 2, _cpu_forward, q, k, v, is_causal=True, dropout_p=0.0, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.rotation, ctx.scale = group, rotation, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor) -> Any:
        from torch.distributed.tensor.experimental._context_parallel import _attention, set_rotate_method

        set_rotate_method(ctx.rotation)
        q, k, v, out, lse = ctx.saved_tensors
        grads = _attention._templated_ring_attention_backward(
            ctx.group,
            2,
            _cpu_backward,
            grad_outs[0],
            "grad_out",
            q,
            k,
            v,
            out,
            lse,
            is_causal=True,
            dropout_p=0.0,
            scale=ctx.scale,
        )
        return (*grads, None, None)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, dropout_p: float, scale: float) -> Any:
    return _forward(q, k, v, dropout_p, is_causal, scale=scale)


def _cpu_backward(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    grad_out: Tensor,
    dropout_p: float,
    scale: float,
) -> Any:
    return _backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, scale=scale)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Give importing peers what they import, and take it away again: others here look for flash-attn too."""
    given = {
        "flash_attn": ModuleType("flash_attn"),
        "flash_attn.flash_attn_interface": flash_attn_2(_block_forward, _block_backward),
        "ring_flash_attn.adapters": ModuleType("ring_flash_attn.adapters"),
    }
    package, interface, adapters = given.values()
    package.__version__ = "2.7.4"  # type: ignore[attr-defined]
    for module in (package, interface):
        for name in ("flash_attn_func", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
            setattr(module, name, _refuse(name))
    for name in ("substitute_hf_flash_attn", "update_ring_flash_attn_params"):
        setattr(adapters, name, _refuse(name))
    for name, module in given.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    before = {name: sys.modules.get(name) for name in given}
    sys.modules.update(given)
    try:
        yield
    finally:
        for name, previous in before.items():
            if previous is None:
                del sys.modules[name]
            else:
                sys.modules[name] = previous


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name}: the benchmark's stand-in for CPUs has it by name alone")

    return refuse


def _block_forward(tensors: list[Tensor], mask: Mask, lengths: PackedLengths | None) -> tuple[Tensor, Tensor]:
    """Run flash-attn's block forward: [b, s, h, d] to (out, lse [b, h, s])."""
    _check(tensors[0], tensors[1], mask)
    out, lse = _forward(*(x.transpose(1, 2) for x in tensors), 0.0, mask.causal, scale=mask.scale)
    return out.transpose(1, 2), lse


def _block_backward(
    tensors: list[Tensor], lse: Tensor, grads: list[Tensor], mask: Mask, lengths: PackedLengths | None
) -> None:
    """Run flash-attn's block backward, and copy the results, because the operator has no outputs."""
    _check(tensors[1], tensors[2], mask)
    values = _backward(*(x.transpose(1, 2) for x in tensors), lse, 0.0, mask.causal, scale=mask.scale)
    for place, grad in zip(grads, values, strict=True):
        place.copy_(grad.transpose(1, 2))


def _check(q: Tensor, k: Tensor, mask: Mask) -> None:
    if mask.causal and q.shape[1] != k.shape[1]:
        raise NotImplementedError("the operator for CPUs aligns a causal block top-left")


def self_sends_copied(contestant: Contestant) -> Any:
    """Return a context in which a ring's messages to its own only rank are copies, where the contestant needs it."""
    return _copying() if contestant.copies_self else nullcontext()


@contextmanager
def _copying() -> Iterator[None]:
    original, me = dist.batch_isend_irecv, dist.get_rank()

    def batch(operations: list[Any]) -> list[Any]:
        own = [operation for operation in operations if operation.peer == me]
        sends = [operation.tensor for operation in own if operation.op is dist.isend]
        receives = [operation.tensor for operation in own if operation.op is dist.irecv]
        for source, place in zip(sends, receives, strict=True):
            place.copy_(source)
        others = [operation for operation in operations if operation.peer != me]
        return original(others) if others else []

    dist.batch_isend_irecv = batch
    try:
        yield
    finally:
        dist.batch_isend_irecv = original
