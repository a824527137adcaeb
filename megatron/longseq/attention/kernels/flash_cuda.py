"""Flash attention on CUDA devices: the flash-attn package, or PyTorch's copy of it."""

import importlib
import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Scores, dense

HEAD_DIM_STEP, HEAD_DIM_LIMIT = 8, 256
_FORWARD = ("q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *_FORWARD[3:])
_Window = dict[str, int]
_Gradients = tuple[Tensor, Tensor, Tensor]


def _batch_first(x: Tensor) -> Tensor:
    """Return [s, b, h, d] as [b, s, h, d], a view if the last dimension is contiguous."""
    return dense(x).transpose(0, 1)


def _window(scores: Scores, q: Tensor, k: Tensor) -> _Window:
    """Return the window of scores as flash attention's arguments, for q and k [s, b, h, d]; -1 is none.

    Raises:
        ValueError: The kernels would also hide keys on the right: they treat a block that is not causal as one with a
            window of all keys to the right of the diagonal.
    """
    if scores.window is not None and not scores.causal and q.shape[0] > k.shape[0] + 1:
        raise ValueError(
            f"a sliding window over {k.shape[0]} keys for {q.shape[0]} rows: flash kernels hide keys from the "
            "first rows of such a block; plan it as two blocks, as `plan_tiles` does"
        )
    left = -1 if scores.window is None else scores.window
    return {"window_size_left": left, "window_size_right": 0 if scores.causal else -1}


class CudaFlash(ABC):
    """Kernel for bfloat16 and float16, head sizes that are multiples of 8 up to 256, and shared key heads.

    Both implementations are aligned bottom-right, support windows, and take [b, s, h, d] of any strides if the last one
    is 1. The log-sum-exp of a row that sees no key is +inf, or -inf where the kernel splits the keys.
    """

    rectangular = True
    wide = False
    dropout = 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        out, lse = self._forward(_batch_first(q), _batch_first(k), _batch_first(v), scores, _window(scores, q, k))
        if scores.causal and q.shape[0] > k.shape[0]:
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return out.transpose(0, 1), lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        tensors = [_batch_first(x) for x in (grad_out, q, k, v, out)]
        lse = lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()
        dq, dk, dv = self._backward(tensors, lse, scores, _window(scores, q, k))
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)

    @abstractmethod
    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, window: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return (out [b, s, h, d], lse [b, h, s]) of q, k and v [b, s, h, d]."""

    @abstractmethod
    def _backward(
        self, tensors: list[Tensor], lse: Tensor, scores: Scores, window: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of grad_out, q, k, v and out, all [b, s, h, d]."""


class TorchCudaFlash(CudaFlash):
    """PyTorch's copy of flash attention."""

    name = "torch CUDA flash"

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, window: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            None,  # cumulative lengths, for packed batches only
            None,
            q.shape[1],
            k.shape[1],
            0.0,  # dropout
            scores.causal,
            False,  # debug mask
            scale=scores.scale,
            **window,
        )
        return out, lse

    def _backward(
        self, tensors: list[Tensor], lse: Tensor, scores: Scores, window: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, q, k, v, out = tensors
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # unused without dropout
        return torch.ops.aten._flash_attention_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            scores.causal,
            seed,
            seed,
            scale=scores.scale,
            **window,
        )


class FlashAttn(CudaFlash):
    """The flash-attn package, version 2.7 or later, recognised by the arguments of its functions."""

    name = "flash_attn"

    def __init__(self) -> None:
        self._functions = load_flash_attn()

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, window: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._functions[0](
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=scores.scale,
            causal=scores.causal,
            **window,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse

    def _backward(
        self, tensors: list[Tensor], lse: Tensor, scores: Scores, window: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, q, k, v, out = tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        self._functions[1](
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            dropout_p=0.0,
            softmax_scale=scores.scale,
            causal=scores.causal,
            **window,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def load_flash_attn() -> tuple[Any, Any]:
    """Return flash-attn's forward and backward functions.

    Raises:
        ImportError: The package is missing or broken, or its functions do not take the arguments of version 2.7.
    """
    module = importlib.import_module("flash_attn.flash_attn_interface")
    functions = []
    for name, wanted in (("_flash_attn_forward", _FORWARD), ("_flash_attn_backward", _BACKWARD)):
        plain = getattr(module, name, None)
        if plain is None:
            raise ImportError(f"flash_attn has no {name}")
        names = _parameters(plain)
        if names[: len(wanted)] != list(wanted):
            raise ImportError(f"flash_attn's {name} takes {', '.join(names)}; version 2.7 or later is needed")
        functions.append(getattr(module, f"_wrapped{name}", plain))
    return functions[0], functions[1]


def _parameters(function: Any) -> list[str]:
    """Return the parameter names of a function, or of the function that a torch custom operator wraps."""
    return list(inspect.signature(getattr(function, "_init_fn", function)).parameters)
