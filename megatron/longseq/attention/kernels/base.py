"""Interface of a block attention kernel."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Scale and mask of a block's scores; the mask is aligned bottom-right: the last row is at the last key.

    Attributes:
        scale: factor of the products of queries and keys.
        causal: row i sees keys j <= i + sk - sq only.
        window: row i sees keys j >= i + sk - sq - window only; None: there is no such bound.
    """

    scale: float
    causal: bool = False
    window: int | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which results and gradients of a type are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous. Kernels take any other strides, but some misread this one."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Kernel(Protocol):
    """Attention of some queries to some keys, with the log-sum-exp by which partial results are merged.

    Layouts: q [sq, b, hq, d], k [sk, b, hk, d], v [sk, b, hk, dv], where hk divides hq; out [sq, b, hq, dv] in the type
    of q; lse [b, hq, sq], the natural log-sum-exp of the scaled scores, in float32 (float64 for float64). There is at
    least one row and one key. A row that sees no key has out 0 and lse -inf.

    Attributes:
        name: name in the log.
        rectangular: takes a causal block with sk > sq, and windows, as fast as squares.
        wide: takes float32 beside narrower types, so that partial results need not be rounded before they are merged.
        dropout: probability of dropping an attention weight. Random numbers come from torch's generator of the device,
            in backward in the same order as in forward; the caller restores the generator's state.
    """

    name: str
    rectangular: bool
    wide: bool
    dropout: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        ...

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of a block; out and lse are those of all keys that the rows see, not of the block."""
        ...
