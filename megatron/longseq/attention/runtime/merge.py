"""Partial results of attention over disjoint keys, merged by their log-sum-exp."""

import torch
from torch import Tensor


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which partial results and gradients of a type are added: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's result into `out` and `lse`, in place.

    Rows that see no key of the block (log-sum-exp of -inf) stay as they are; rows that saw none before take the
    block's.

    Args:
        out: [s, b, h, d], float32 (float64).
        lse: [b, h, s], float32 or float64. Over many merges float32 loses a fifth of the accuracy that a kernel has:
            at a value of 8 its steps are 5e-7, an error of that size in every weight.
        block_out: [s, b, h, d], any float type, finite in every row.
        block_lse: [b, h, s], float32 (float64).
    """
    share = torch.sigmoid(block_lse - lse).masked_fill_(block_lse == -torch.inf, 0.0)
    out.lerp_(block_out.to(out.dtype), share.to(out.dtype).permute(2, 0, 1).unsqueeze(-1))
    torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)
