"""Flash attention on CUDA devices: the flash-attn package, or PyTorch's copy of it."""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import BackwardInputs, PackedLengths, Scores, dense

HEAD_DIM_STEP, HEAD_DIM_LIMIT = 8, 256
_FORWARD = ("q", "k", "v")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_OPTIONS = ("dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right")


def _batch_first(x: Tensor) -> Tensor:
    """Return [s, b, h, d] as [b, s, h, d], a view if the last dimension is contiguous."""
    return dense(x).transpose(0, 1)


class _Arguments(NamedTuple):
    """`Scores` and lengths as flash attention's arguments.

    Attributes:
        scale, causal: as in `Scores`.
        left, right: keys of the window before and behind a row; -1: all.
        rows, keys: lengths of the block; of packed blocks, the longest ones.
        row_offsets, key_offsets: see `PackedLengths.offsets`; None: blocks are not packed.
    """

    scale: float
    causal: bool
    left: int
    right: int
    rows: int
    keys: int
    row_offsets: Tensor | None = None
    key_offsets: Tensor | None = None

    @classmethod
    def of(cls, scores: Scores, rows: int, keys: int) -> "_Arguments":
        """Return the arguments for a block.

        Raises:
            ValueError: The kernels would also hide keys on the right: they treat a block that is not causal as one with
                a window of all keys to the right of the diagonal.
        """
        if scores.window is not None and not scores.causal and rows > keys + 1:
            raise ValueError(
                f"sliding window with {keys} keys and {rows} queries: the flash kernels would mask keys of the first "
                "queries; split the block in two, as `plan_tiles` does"
            )
        left = -1 if scores.window is None else scores.window
        return cls(scores.scale, scores.causal, left, 0 if scores.causal else -1, rows, keys)

    @classmethod
    def of_packed(cls, scores: Scores, lengths: PackedLengths, device: torch.device) -> "_Arguments":
        """Return the arguments for packed blocks.

        Raises:
            ValueError: See `of`.
        """
        rows, keys, steepest = lengths.longest()
        made = cls.of(scores, *steepest)
        row_offsets, key_offsets = lengths.offsets(device)
        return made._replace(rows=rows, keys=keys, row_offsets=row_offsets, key_offsets=key_offsets)


class CudaFlash(ABC):
    """Kernel for bfloat16 and float16, head sizes that are multiples of 8 up to 256, and shared key heads.

    All implementations are aligned bottom-right, support windows, and take [b, s, h, d] of any strides if the last one
    is 1. The log-sum-exp of a row that sees no key is +inf, or -inf where the kernel splits the keys. Packed blocks are
    [total, h, d], with the first row of every block in an int32 tensor.
    """

    rectangular = True
    wide = False
    dropout = 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        how = _Arguments.of(scores, q.shape[0], k.shape[0])
        out, lse = self._forward([_batch_first(x) for x in (q, k, v)], how)
        if scores.causal and q.shape[0] > k.shape[0]:
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return out.transpose(0, 1), lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        how = _Arguments.of(scores, q.shape[0], k.shape[0])
        dq, dk, dv = self._backward([_batch_first(x) for x in (grad_out, q, k, v, out)], _for_backward(lse), how)
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, lengths: PackedLengths
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward_packed`: one call."""
        how = _Arguments.of_packed(scores, lengths, q.device)
        out, lse = self._forward([dense(x)[:, 0] for x in (q, k, v)], how)
        return out.unsqueeze(1), lse.unsqueeze(0)

    def backward_packed(
        self, inputs: BackwardInputs, scores: Scores, lengths: PackedLengths
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward_packed`: one call."""
        *tensors, lse = inputs
        how = _Arguments.of_packed(scores, lengths, lse.device)
        dq, dk, dv = self._backward([dense(x)[:, 0] for x in tensors], _for_backward(lse)[0], how)
        return dq.unsqueeze(1), dk.unsqueeze(1), dv.unsqueeze(1)

    @abstractmethod
    def _forward(self, tensors: list[Tensor], how: _Arguments) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of q, k and v: [b, s, h, d] and [b, h, s], or packed [total, h, d] and [h, total]."""

    @abstractmethod
    def _backward(self, tensors: list[Tensor], lse: Tensor, how: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of grad_out, q, k, v and out, all as in `_forward`."""


def _for_backward(lse: Tensor) -> Tensor:
    """Return log-sum-exps with which rows that see no key have weights 0."""
    return lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()


class TorchCudaFlash(CudaFlash):
    """PyTorch's copy of flash attention."""

    name = "torch CUDA flash"

    def _forward(self, tensors: list[Tensor], how: _Arguments) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *tensors,
            how.row_offsets,
            how.key_offsets,
            how.rows,
            how.keys,
            0.0,  # dropout
            how.causal,
            False,  # debug mask
            scale=how.scale,
            window_size_left=how.left,
            window_size_right=how.right,
        )
        return out, lse

    def _backward(self, tensors: list[Tensor], lse: Tensor, how: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
        seed = torch.zeros(2, dtype=torch.uint64, device=lse.device)  # unused without dropout
        return torch.ops.aten._flash_attention_backward(
            *tensors,
            lse,
            how.row_offsets,
            how.key_offsets,
            how.rows,
            how.keys,
            0.0,
            how.causal,
            seed,
            seed,
            scale=how.scale,
            window_size_left=how.left,
            window_size_right=how.right,
        )


class FlashAttn(CudaFlash):
    """The flash-attn package, version 2.7 or later, recognised by the arguments of its functions."""

    name = "flash_attn"

    def __init__(self) -> None:
        self._functions = load_flash_attn()

    def _forward(self, tensors: list[Tensor], how: _Arguments) -> tuple[Tensor, Tensor]:
        function = self._functions.forward if how.row_offsets is None else self._functions.varlen_forward
        out, lse, *_ = function(*tensors, **self._packed(how), **self._options(how), return_softmax=False)
        return out, lse

    def _backward(self, tensors: list[Tensor], lse: Tensor, how: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
        function = self._functions.backward if how.row_offsets is None else self._functions.varlen_backward
        dq, dk, dv = (torch.empty_like(x) for x in tensors[1:4])
        deterministic = torch.are_deterministic_algorithms_enabled()
        function(*tensors, lse, dq, dk, dv, **self._packed(how), **self._options(how), deterministic=deterministic)
        return dq, dk, dv

    @staticmethod
    def _packed(how: _Arguments) -> dict[str, Any]:
        if how.row_offsets is None:
            return {}
        return {
            "cu_seqlens_q": how.row_offsets,
            "cu_seqlens_k": how.key_offsets,
            "max_seqlen_q": how.rows,
            "max_seqlen_k": how.keys,
        }

    @staticmethod
    def _options(how: _Arguments) -> dict[str, Any]:
        return {
            "dropout_p": 0.0,
            "softmax_scale": how.scale,
            "causal": how.causal,
            "window_size_left": how.left,
            "window_size_right": how.right,
            "softcap": 0.0,
            "alibi_slopes": None,
        }


class _FlashAttnFunctions(NamedTuple):
    """Functions of the flash-attn package."""

    forward: Any
    backward: Any
    varlen_forward: Any
    varlen_backward: Any


def load_flash_attn() -> _FlashAttnFunctions:
    """Return flash-attn's forward and backward functions, of batches and of packed blocks.

    Raises:
        ImportError: The package is missing or broken, or its functions do not take the arguments of version 2.7.
    """
    module = importlib.import_module("flash_attn.flash_attn_interface")
    functions = []
    for name, expected in (
        ("_flash_attn_forward", (*_FORWARD, *_OPTIONS)),
        ("_flash_attn_backward", (*_BACKWARD, *_OPTIONS)),
        ("_flash_attn_varlen_forward", (*_FORWARD, *_LENGTHS, *_OPTIONS)),
        ("_flash_attn_varlen_backward", (*_BACKWARD, *_LENGTHS, *_OPTIONS)),
    ):
        plain = getattr(module, name, None)
        if plain is None:
            raise ImportError(f"flash_attn has no {name}")
        names = list(_parameters(plain))
        if names[: len(expected)] != list(expected):
            raise ImportError(f"flash_attn's {name} takes {', '.join(names)}; install flash-attn 2.7 or later")
        functions.append(getattr(module, f"_wrapped{name}", plain))
    return _FlashAttnFunctions(*functions)


class FlashAttn3(CudaFlash):
    """FlashAttention 3 (package flash_attn_interface), for Hopper."""

    name = "flash_attn 3"

    def __init__(self) -> None:
        self._forward_of, self._backward_of = load_flash_attn_3()

    def _forward(self, tensors: list[Tensor], how: _Arguments) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward_of(tensors, how)
        return out, lse

    def _backward(self, tensors: list[Tensor], lse: Tensor, how: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x) for x in tensors[1:4])
        deterministic = torch.are_deterministic_algorithms_enabled()
        self._backward_of([*tensors, lse], how, dq=dq, dk=dk, dv=dv, deterministic=deterministic)
        return dq, dk, dv


class _FlashAttn3Function:
    """A function of FlashAttention 3, whose releases differ in names and in what may be left out.

    Args:
        function: the function.
        first: names of its first parameters.
        needed: names of others that must be there.

    Raises:
        ImportError: It takes other arguments.
    """

    def __init__(self, function: Any, first: tuple[str, ...], needed: tuple[str, ...]) -> None:
        parameters = _parameters(function)
        self._function, self._has_pair = function, "window_size" in parameters
        self._causal = "is_causal" if "is_causal" in parameters else "causal"
        window = ("window_size",) if self._has_pair else ("window_size_left", "window_size_right")
        expected = {*needed, *_LENGTHS, *window, self._causal, "softmax_scale"}
        if list(parameters)[: len(first)] != list(first) or not expected <= {*parameters}:
            raise ImportError(
                f"flash_attn_interface has a function of {', '.join(parameters)}, which is not FlashAttention 3's"
            )
        required = [name for name, one in parameters.items() if one.default is one.empty and name not in first]
        self._unused = dict.fromkeys(name for name in required if name not in {*expected, *needed})

    def __call__(self, tensors: list[Tensor], how: _Arguments, **more: Any) -> Any:
        """Call the function with tensors and with the arguments that all releases have."""
        lengths = (how.row_offsets, how.key_offsets, how.rows, how.keys) if how.row_offsets is not None else [None] * 4
        named = {**self._unused, **dict(zip(_LENGTHS, lengths, strict=True)), **more}
        named |= {"softmax_scale": how.scale, self._causal: how.causal}
        if self._has_pair:
            return self._function(*tensors, **named, window_size=(how.left, how.right))
        return self._function(*tensors, **named, window_size_left=how.left, window_size_right=how.right)


def load_flash_attn_3() -> tuple[_FlashAttn3Function, _FlashAttn3Function]:
    """Return FlashAttention 3's forward and backward functions.

    Raises:
        ImportError: The package is missing or broken, or its functions take other arguments than those used here.
    """
    module = importlib.import_module("flash_attn_interface")
    functions = [getattr(module, name, None) for name in ("_flash_attn_forward", "_flash_attn_backward")]
    if None in functions:
        raise ImportError("flash_attn_interface has no _flash_attn_forward, or no _flash_attn_backward")
    forward, backward = functions
    return (
        _FlashAttn3Function(forward, _FORWARD, ()),
        _FlashAttn3Function(backward, _BACKWARD[:6], (*_BACKWARD[6:], "deterministic")),
    )


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function, or of the function that a torch custom operator wraps."""
    return inspect.signature(getattr(function, "_init_fn", function)).parameters
