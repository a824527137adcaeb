"""Attention by its formula: the kernel that tests trust, and the one with dropout."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from megatron.longseq.attention.kernels.base import Scores
from megatron.longseq.attention.runtime.merge import accumulation


def visible(rows: int, keys: int, scores: Scores, device: torch.device) -> Tensor:
    """Return the bool mask [rows, keys] of what is seen."""
    diagonal = torch.arange(rows, device=device)[:, None] + (keys - rows)
    key = torch.arange(keys, device=device)[None, :]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if scores.causal:
        seen &= key <= diagonal
    if scores.window is not None:
        seen &= key >= diagonal - scores.window
    return seen


@dataclass(slots=True)
class Reference:
    """Holds the whole score matrix [b, hq, sq, sk], in float32 or float64 whatever the input.

    Attributes:
        dropout: see `Kernel`.
        compute: type of the arithmetic; None: float32, or float64 for float64.
    """

    name = "reference"
    rectangular = True
    wide = True
    dropout: float = 0.0
    compute: torch.dtype | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        logits = self._logits(q, k, scores)
        lse = logits.logsumexp(-1)
        weights = self._weights(logits, lse).mul_(self._kept(logits, q.dtype))
        out = self._heads(weights @ self._spread(v), q).to(q.dtype)
        return out, lse.flatten(1, 2).to(accumulation(q.dtype))

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        logits = self._logits(q, k, scores)
        kept = self._kept(logits, q.dtype)
        weights = self._weights(logits, lse.to(logits.dtype).unflatten(1, logits.shape[1:3]))
        grad, result = self._group(grad_out, k), self._group(out, k)
        dv = ((weights * kept).mT @ grad).sum(2)
        delta = (grad * result).sum(-1, keepdim=True)
        grad_scores = weights * (kept * (grad @ self._spread(v).mT) - delta) * scores.scale
        dq = self._heads(grad_scores @ self._spread(k), q)
        dk = (grad_scores.mT @ self._group(q, k)).sum(2)
        return dq.to(q.dtype), dk.permute(2, 0, 1, 3).to(k.dtype), dv.permute(2, 0, 1, 3).to(v.dtype)

    def _type(self, x: Tensor) -> torch.dtype:
        return self.compute or accumulation(x.dtype)

    def _group(self, x: Tensor, k: Tensor) -> Tensor:
        """[s, b, hq, d] to [b, hk, hq / hk, s, d]: the query heads of each key head side by side."""
        return x.to(self._type(x)).permute(1, 2, 0, 3).unflatten(1, (k.shape[2], -1))

    def _spread(self, x: Tensor) -> Tensor:
        """[s, b, hk, d] to [b, hk, 1, s, d]."""
        return x.to(self._type(x)).permute(1, 2, 0, 3).unsqueeze(2)

    @staticmethod
    def _heads(x: Tensor, q: Tensor) -> Tensor:
        """[b, hk, hq / hk, s, d] to [s, b, hq, d]."""
        return x.reshape(q.shape[1], q.shape[2], q.shape[0], -1).permute(2, 0, 1, 3)

    def _logits(self, q: Tensor, k: Tensor, scores: Scores) -> Tensor:
        logits = (self._group(q, k) @ self._spread(k).mT).mul_(scores.scale)
        if scores.causal or scores.window is not None:
            logits.masked_fill_(~visible(q.shape[0], k.shape[0], scores, q.device), -torch.inf)
        return logits

    @staticmethod
    def _weights(logits: Tensor, lse: Tensor) -> Tensor:
        """Softmax; rows that see nothing have weights 0."""
        return (logits - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)).exp_()

    def _kept(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """1 / (1 - p) where a weight is kept, else 0; drawn anew from the device's generator."""
        ones = logits.new_ones(logits.shape, dtype=dtype)
        return drop(ones, self.dropout).to(logits.dtype) if self.dropout else ones.to(logits.dtype)
