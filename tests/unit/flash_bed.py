"""Stand-ins for the flash-attn packages: their signatures, and the reference's values."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import BackwardInputs, PackedLengths, Scores
from megatron.longseq.attention.kernels.reference import Reference

EXACT = Reference()


class Mask(NamedTuple):
    """The arguments of scores, as flash-attn's functions take them."""

    scale: float
    causal: bool
    left: int
    right: int

    @property
    def scores(self) -> Scores:
        """The mask as our kernels take it."""
        assert self.right == (0 if self.causal else -1) and self.left >= -1
        return Scores(self.scale, self.causal, None if self.left == -1 else self.left)


# Of [b, s, h, d] tensors q, k, v: (out, lse). With lengths: of packed [total, h, d] tensors.
Forward = Callable[[list[Tensor], Mask, PackedLengths | None], tuple[Tensor, Tensor]]
# Of grad_out, q, k, v, out and of lse; writes (dq, dk, dv) into the third argument.
Backward = Callable[[list[Tensor], Tensor, list[Tensor], Mask, PackedLengths | None], None]


def _lengths(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> PackedLengths:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    rows, keys = (tuple(cu.diff().tolist()) for cu in (cu_q, cu_k))
    assert (max(rows), max(keys)) == (max_q, max_k) and cu_q[0] == cu_k[0] == 0
    return PackedLengths(rows, keys)


def _forward(tensors: list[Tensor], mask: Mask, lengths: PackedLengths | None) -> tuple[Tensor, Tensor]:
    assert all(x.stride(-1) == 1 for x in tensors)
    if lengths is not None:
        out, lse = EXACT.forward_packed(*(x.unsqueeze(1) for x in tensors), mask.scores, lengths)
        return out.squeeze(1), lse.squeeze(0)
    out, lse = EXACT.forward(*(x.transpose(0, 1) for x in tensors), mask.scores)
    return out.transpose(0, 1), lse


def _forward_2(tensors: list[Tensor], mask: Mask, lengths: PackedLengths | None) -> tuple[Tensor, Tensor]:
    out, lse = _forward(tensors, mask, lengths)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def _backward(
    tensors: list[Tensor], lse: Tensor, grads: list[Tensor], mask: Mask, lengths: PackedLengths | None
) -> None:
    assert not (lse == -torch.inf).any() and lse.is_contiguous() and all(x.stride(-1) == 1 for x in tensors)
    if lengths is not None:
        given = BackwardInputs(*(x.unsqueeze(1) for x in tensors), lse.unsqueeze(0))
        values = EXACT.backward_packed(given, mask.scores, lengths)
        values = tuple(x.squeeze(1) for x in values)  # type: ignore[assignment]
    else:
        values = EXACT.backward(*(x.transpose(0, 1) for x in tensors), lse, mask.scores)
        values = tuple(x.transpose(0, 1) for x in values)  # type: ignore[assignment]
    for grad, value in zip(grads, values, strict=True):
        grad.copy_(value)


def flash_attn_2(forward: Forward = _forward_2, backward: Backward = _backward) -> ModuleType:
    """Return a module with the functions of flash-attn 2.7's interface.

    Args:
        forward, backward: what they compute.
    """
    module = ModuleType("flash_attn.flash_attn_interface")
    nothing = torch.empty(0)

    def _flash_attn_forward(  # noqa: PLR0917
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        mask = Mask(softmax_scale, causal, window_size_left, window_size_right)
        return *forward([q, k, v], mask, None), nothing, nothing

    def _flash_attn_varlen_forward(  # noqa: PLR0917
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
        block_table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert (dropout_p, softcap, alibi_slopes, return_softmax, block_table) == (0.0, 0.0, None, False, None)
        mask = Mask(softmax_scale, causal, window_size_left, window_size_right)
        lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *forward([q, k, v], mask, lengths), nothing, nothing

    def _flash_attn_backward(  # noqa: PLR0917
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, softcap, alibi_slopes, deterministic, rng_state) == (0.0, 0.0, None, False, None)
        mask = Mask(softmax_scale, causal, window_size_left, window_size_right)
        backward([dout, q, k, v, out], softmax_lse, [dq, dk, dv], mask, None)
        return nothing

    def _flash_attn_varlen_backward(  # noqa: PLR0917
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, softcap, alibi_slopes, deterministic, rng_state) == (0.0, 0.0, None, False, None)
        mask = Mask(softmax_scale, causal, window_size_left, window_size_right)
        lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        backward([dout, q, k, v, out], softmax_lse, [dq, dk, dv], mask, lengths)
        return nothing

    for function in (
        _flash_attn_forward,
        _flash_attn_backward,
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
    ):
        setattr(module, function.__name__, function)
    return module


def flash_attn_3() -> ModuleType:
    """Return a module with the functions of FlashAttention 3's interface, as of its release for PyTorch's operators."""
    module = ModuleType("flash_attn_interface")
    nothing = torch.empty(0)

    def _flash_attn_forward(  # noqa: PLR0917
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
        qv: Tensor | None = None,
        out_: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cu_seqlens_k_new: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        page_table: Tensor | None = None,
        kv_batch_idx: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        seqlens_rotary: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Tensor | None = None,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert softmax_scale is not None
        mask = Mask(softmax_scale, causal, window_size_left, window_size_right)
        lengths = None
        if cu_seqlens_q is not None:
            assert cu_seqlens_k is not None and max_seqlen_q is not None and max_seqlen_k is not None
            lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *_forward([q, k, v], mask, lengths), nothing, nothing

    def _flash_attn_backward(  # noqa: PLR0917
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sequed_q: Tensor | None = None,
        sequed_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:
        assert softmax_scale is not None and dq is not None and dk is not None and dv is not None and not deterministic
        mask = Mask(softmax_scale, is_causal, window_size_left, window_size_right)
        lengths = None
        if cu_seqlens_q is not None:
            assert cu_seqlens_k is not None and max_seqlen_q is not None and max_seqlen_k is not None
            lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _backward([dout, q, k, v, out], softmax_lse, [dq, dk, dv], mask, lengths)
        return nothing

    module._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    module._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    return module


def early_flash_attn_3() -> ModuleType:
    """Return a module that names the mask as FlashAttention 3 did at first, when no argument could be left out."""
    module, last = ModuleType("flash_attn_interface"), flash_attn_3()

    def _flash_attn_forward(  # noqa: PLR0917
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: None,
        v_new: None,
        qv: None,
        out: None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        cu_seqlens_k_new: None,
        seqused_q: None,
        seqused_k: None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        page_table: None,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
    ) -> tuple[Tensor, ...]:
        lengths = cu_seqlens_q, cu_seqlens_k, None, None, None, max_seqlen_q, max_seqlen_k
        mask = {"causal": causal, "window_size_left": window_size[0], "window_size_right": window_size[1]}
        return last._flash_attn_forward(  # type: ignore[no-any-return]
            q, k, v, None, None, None, None, *lengths, softmax_scale=softmax_scale, **mask
        )

    def _flash_attn_backward(  # noqa: PLR0917
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        sequed_q: None,
        sequed_k: None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> Tensor:
        lengths = cu_seqlens_q, cu_seqlens_k, None, None, max_seqlen_q, max_seqlen_k
        return last._flash_attn_backward(  # type: ignore[no-any-return]
            dout, q, k, v, out, softmax_lse, *lengths, dq, dk, dv, softmax_scale, causal, *window_size
        )

    module._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    module._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    return module


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Make a stand-in importable under its name."""
    package = module.__name__.partition(".")[0]
    if package != module.__name__:
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, module.__name__, module)
