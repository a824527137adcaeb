"""What a block attention kernel is."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """How the scores of a block are made; aligned bottom-right: the last row stands at the last key.

    Attributes:
        scale: factor of q times k.
        causal: row i sees keys j <= i + sk - sq alone.
        window: row i sees keys j >= i + sk - sq - window alone; None: no such bound.
    """

    scale: float
    causal: bool = False
    window: int | None = None


def dense(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous: kernels take any other strides, and some misread this one."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Kernel(Protocol):
    """Attention of some queries to some keys, with the log-sum-exp that lets partial results be merged.

    Layouts: q [sq, b, hq, d], k [sk, b, hk, d], v [sk, b, hk, dv], hk divides hq; out [sq, b, hq, dv] in q's type;
    lse [b, hq, sq] of the scaled scores, natural logarithm, float32 (float64 for float64). At least one row and one
    key. A row that sees no key has out 0 and lse -inf.

    Attributes:
        name: for the log.
        rectangular: takes a causal block with sk > sq, and windows, as fast as squares.
        wide: takes float32 beside narrower types, so that partial results can be left unrounded until they are merged.
        dropout: probability of dropping an attention weight; drawn from torch's generator of the device, in forward and
            again, in the same order, in backward: the caller puts the generator back.
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
        """Return (dq, dk, dv) of this block; out and lse are those of all keys that the rows saw, not of the block."""
        ...
