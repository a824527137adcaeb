"""Attention by its formula: the reference of the tests, and the only kernel with dropout."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from megatron.longseq.attention.kernels.base import BackwardInputs, Scores, accumulation_dtype
from megatron.longseq.attention.kernels.padded import PaddedKernel


def visible_mask(rows: int, keys: int, scores: Scores, device: torch.device) -> Tensor:
    """Return the mask [rows, keys] of type bool, True where a row sees a key; the last row belongs to the last key.

    Args:
        rows, keys: numbers of queries and keys.
        scores: mask; the scale is not used.
        device: device of the mask.
    """
    diagonal = torch.arange(rows, device=device)[:, None] + (keys - rows)
    key = torch.arange(keys, device=device)[None, :]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if scores.causal:
        seen &= key <= diagonal
    if scores.window is not None:
        seen &= key >= diagonal - scores.window
    return seen


@dataclass(slots=True)
class Reference(PaddedKernel):
    """Kernel that materialises the score matrix [b, hq, sq, sk] in float32, or float64 for float64.

    Attributes:
        dropout: see `Kernel`.
        compute: type of the arithmetic; None: as above.
    """

    name = "reference"
    rectangular = True
    wide = True
    most_scores = 1 << 22  # a batch's scores are in memory at once
    dropout: float = 0.0
    compute: torch.dtype | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        return self.forward_padded(q, k, v, scores, None)

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        return self.backward_padded(BackwardInputs(grad_out, q, k, v, out, lse), scores, None)

    def forward_padded(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `PaddedKernel.forward_padded`."""
        logits = self._logits(q, k, scores, hidden)
        lse = logits.logsumexp(-1)
        weights = self._weights(logits, lse).mul_(self._dropout_mask(logits, q.dtype))
        out = self._heads(weights @ self._keys(v), q).to(q.dtype)
        return out, lse.flatten(1, 2).to(accumulation_dtype(q.dtype))

    def backward_padded(
        self, inputs: BackwardInputs, scores: Scores, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PaddedKernel.backward_padded`."""
        grad_out, q, k, v, out, lse = inputs
        logits = self._logits(q, k, scores, hidden)
        mask = self._dropout_mask(logits, q.dtype)
        weights = self._weights(logits, lse.to(logits.dtype).unflatten(1, logits.shape[1:3]))
        grad, result = self._group(grad_out, k), self._group(out, k)
        dv = ((weights * mask).mT @ grad).sum(2)
        delta = (grad * result).sum(-1, keepdim=True)
        grad_scores = weights * (mask * (grad @ self._keys(v).mT) - delta) * scores.scale
        dq = self._heads(grad_scores @ self._keys(k), q)
        dk = (grad_scores.mT @ self._group(q, k)).sum(2)
        return dq.to(q.dtype), dk.permute(2, 0, 1, 3).to(k.dtype), dv.permute(2, 0, 1, 3).to(v.dtype)

    def _type(self, x: Tensor) -> torch.dtype:
        return self.compute or accumulation_dtype(x.dtype)

    def _group(self, x: Tensor, k: Tensor) -> Tensor:
        """Return [s, b, hq, d] as [b, hk, hq / hk, s, d]: query heads grouped by their key head."""
        return x.to(self._type(x)).permute(1, 2, 0, 3).unflatten(1, (k.shape[2], -1))

    def _keys(self, x: Tensor) -> Tensor:
        """Return [s, b, hk, d] as [b, hk, 1, s, d]."""
        return x.to(self._type(x)).permute(1, 2, 0, 3).unsqueeze(2)

    @staticmethod
    def _heads(x: Tensor, q: Tensor) -> Tensor:
        """Return [b, hk, hq / hk, s, d] as [s, b, hq, d]."""
        return x.reshape(q.shape[1], q.shape[2], q.shape[0], -1).permute(2, 0, 1, 3)

    def _logits(self, q: Tensor, k: Tensor, scores: Scores, hidden: Tensor | None) -> Tensor:
        """Return the scores [b, hk, hq / hk, sq, sk], -inf where they are masked by `hidden`, or else by `scores`."""
        logits = (self._group(q, k) @ self._keys(k).mT).mul_(scores.scale)
        if hidden is not None:
            logits.masked_fill_(hidden[:, None, None], -torch.inf)
        elif scores.causal or scores.window is not None:
            logits.masked_fill_(~visible_mask(q.shape[0], k.shape[0], scores, q.device), -torch.inf)
        return logits

    @staticmethod
    def _weights(logits: Tensor, lse: Tensor) -> Tensor:
        """Return the softmax weights; rows that see no key have weights 0."""
        return (logits - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)).exp_()

    def _dropout_mask(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Return 1 / (1 - p) where a weight is kept, else 0, drawn from the device's generator."""
        ones = logits.new_ones(logits.shape, dtype=dtype)
        return drop(ones, self.dropout).to(logits.dtype) if self.dropout else ones.to(logits.dtype)
