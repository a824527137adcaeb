"""PyTorch's flash attention on CPUs, with bottom-right alignment and windows."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron.longseq.attention.kernels.base import Scores, dense
from megatron.longseq.attention.kernels.reference import visible
from megatron.longseq.attention.plan.tiles import Block, Span, Tile
from megatron.longseq.attention.runtime.tiled import attend, attend_backward

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuFlash:
    """float64, float32, bfloat16 and float16; K/V heads fewer than query heads without repeating them.

    The operator aligns a causal block top-left, so it is given squares alone: a causal block with more keys than rows
    is the keys before the rows and the rows' square, merged. Windows go through an additive mask.
    """

    name = "torch CPU flash"
    rectangular = False
    wide = True
    dropout = 0.0

    def __init__(self) -> None:
        self._mask: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        blind = _blind(q, k, scores)
        if blind:
            out, lse = self.forward(q[blind:], k, v, scores)
            return _after(blind, out), pad(lse, (blind, 0), value=-torch.inf)
        if _is_cut(q, k, scores):
            return attend(self, q, k, v, _two_blocks(q, k), scores.scale)
        out, lse = _forward(
            *(_heads_first(x) for x in (q, k, v)),
            0.0,
            scores.causal and scores.window is None,
            attn_mask=self._additive(q, k, scores),
            scale=scores.scale,
        )
        return out.permute(2, 0, 1, 3), lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        blind = _blind(q, k, scores)
        if blind:
            dq, dk, dv = self.backward(grad_out[blind:], q[blind:], k, v, out[blind:], lse[..., blind:], scores)
            return _after(blind, dq), dk, dv
        if _is_cut(q, k, scores):
            dk, dv = torch.empty_like(k), torch.empty_like(v)

            def place(_: Span, keys: Span, grad_k: Tensor, grad_v: Tensor) -> None:
                dk[keys.slice()], dv[keys.slice()] = grad_k, grad_v

            saved = q, k, v, out, lse
            whole = attend_backward(self, saved, grad_out, _two_blocks(q, k), scores.scale, place)
            assert whole is not None, "there are rows"
            return whole, dk, dv
        grads = _backward(
            *(_heads_first(x) for x in (grad_out, q, k, v, out)),
            lse,
            0.0,
            scores.causal and scores.window is None,
            attn_mask=self._additive(q, k, scores),
            scale=scores.scale,
        )
        dq, dk, dv = (grad.permute(2, 0, 1, 3) for grad in grads)
        return dq, dk, dv

    def _additive(self, q: Tensor, k: Tensor, scores: Scores) -> Tensor | None:
        """Return the mask of a window, in q's type (the operator misreads a float32 one for float64); keep the last."""
        if scores.window is None:
            return None
        key = (q.shape[0], k.shape[0], replace(scores, scale=1.0), q.dtype)
        kept = self._mask  # read once: another thread may compute, too
        if kept is None or kept[0] != key:
            seen = visible(q.shape[0], k.shape[0], scores, q.device)
            self._mask = kept = key, torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
        return kept[1]


def _heads_first(x: Tensor) -> Tensor:
    """[s, b, h, d] to [b, h, s, d], a view where the last dimension is contiguous."""
    return dense(x).permute(1, 2, 0, 3)


def _blind(q: Tensor, k: Tensor, scores: Scores) -> int:
    """Return how many first rows see no key."""
    return max(0, q.shape[0] - k.shape[0]) if scores.causal else 0


def _after(blind: int, x: Tensor) -> Tensor:
    """Put rows of zeros in front."""
    return pad(x, (0, 0, 0, 0, 0, 0, blind, 0))


def _is_cut(q: Tensor, k: Tensor, scores: Scores) -> bool:
    """Return whether a causal block is no square."""
    return scores.causal and scores.window is None and q.shape[0] < k.shape[0]


def _two_blocks(q: Tensor, k: Tensor) -> tuple[Tile]:
    before = k.shape[0] - q.shape[0]
    own = Block(Span(before, k.shape[0]), causal=True)
    return (Tile(Span(0, q.shape[1]), Span(0, q.shape[0]), (own, Block(Span(0, before), causal=False))),)
