"""PyTorch's flash attention for CPUs, with bottom-right alignment and windows."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron.longseq.attention.kernels.base import BackwardInputs, Scores, dense
from megatron.longseq.attention.kernels.padded import PaddedKernel
from megatron.longseq.attention.kernels.reference import visible_mask

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class CpuFlash(PaddedKernel):
    """Kernel for float64, float32, bfloat16 and float16; shared key heads are not repeated.

    The operator aligns a causal block top-left, so a causal block needs as many keys as rows: `plan_tiles` cuts others
    for a kernel that is not `rectangular`. Windows are additive masks, and such blocks may have any shape.
    """

    name = "torch CPU flash"
    rectangular = False
    wide = True
    most_scores = 1 << 62  # the operator materializes no scores
    dropout = 0.0

    def __init__(self) -> None:
        self._mask: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`.

        Raises:
            ValueError: A causal block without a window has more keys than rows.
        """
        blind = _blind_rows(q, k, scores)
        if blind:
            out, lse = self.forward(q[blind:], k, v, scores)
            return _prepend_zeros(blind, out), pad(lse, (blind, 0), value=-torch.inf)
        return self.forward_padded(q, k, v, scores, None)

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        blind = _blind_rows(q, k, scores)
        if blind:
            dq, dk, dv = self.backward(grad_out[blind:], q[blind:], k, v, out[blind:], lse[..., blind:], scores)
            return _prepend_zeros(blind, dq), dk, dv
        return self.backward_padded(BackwardInputs(grad_out, q, k, v, out, lse), scores, None)

    def forward_padded(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `PaddedKernel.forward_padded`."""
        _refuse_misaligned(q, k, scores)
        out, lse = _forward(
            *(_heads_first(x) for x in (q, k, v)),
            0.0,
            scores.causal and scores.window is None,
            attn_mask=self._additive_mask(q, k, scores) if hidden is None else _additive(hidden, q.dtype),
            scale=scores.scale,
        )
        return out.permute(2, 0, 1, 3), lse

    def backward_padded(
        self, inputs: BackwardInputs, scores: Scores, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PaddedKernel.backward_padded`."""
        *tensors, lse = inputs
        _refuse_misaligned(inputs.q, inputs.k, scores)
        grads = _backward(
            *(_heads_first(x) for x in tensors),
            lse,
            0.0,
            scores.causal and scores.window is None,
            attn_mask=self._additive_mask(inputs.q, inputs.k, scores)
            if hidden is None
            else _additive(hidden, inputs.q.dtype),
            scale=scores.scale,
        )
        dq, dk, dv = (grad.permute(2, 0, 1, 3) for grad in grads)
        return dq, dk, dv

    def _additive_mask(self, q: Tensor, k: Tensor, scores: Scores) -> Tensor | None:
        """Return the mask of a window in the type of q, because the operator misreads a float32 mask of float64 input.

        The last mask is cached: neighbouring tiles have equal ones.
        """
        if scores.window is None:
            return None
        key = (q.shape[0], k.shape[0], replace(scores, scale=1.0), q.dtype)
        cached = self._mask  # read once, because another thread may replace it
        if cached is None or cached[0] != key:
            seen = visible_mask(q.shape[0], k.shape[0], scores, q.device)
            self._mask = cached = key, _additive(~seen, q.dtype)
        return cached[1]


def _heads_first(x: Tensor) -> Tensor:
    """Return [s, b, h, d] as [b, h, s, d], a view if the last dimension is contiguous."""
    return dense(x).permute(1, 2, 0, 3)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -inf where keys are hidden: [rows, keys], or [b, 1, rows, keys] of masks [b, rows, keys]."""
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return mask if mask.dim() == 2 else mask.unsqueeze(1)


def _blind_rows(q: Tensor, k: Tensor, scores: Scores) -> int:
    """Return the number of first rows that see no key."""
    return max(0, q.shape[0] - k.shape[0]) if scores.causal else 0


def _refuse_misaligned(q: Tensor, k: Tensor, scores: Scores) -> None:
    """Refuse a block that the operator would misalign.

    Raises:
        ValueError: A causal block without a window has more keys than rows.
    """
    if scores.causal and scores.window is None and q.shape[0] < k.shape[0]:
        raise ValueError(
            f"causal block of {q.shape[0]} queries and {k.shape[0]} keys: PyTorch's CPU kernel needs equal numbers; "
            "split it in two, as `plan_tiles` does with rectangular=False"
        )


def _prepend_zeros(rows: int, x: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, 0, 0, 0, rows, 0))
