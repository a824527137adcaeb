"""Merge of a block's result into the running result, by log-sum-exp."""

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, rows: Tensor | None = None) -> None:
    """Merge the result of a block into `out` and `lse`, in place.

    Rows that see no key of the block (log-sum-exp of -inf) are unchanged; rows that saw no key before take the block's
    result.

    Args:
        out: [s, b, h, d], float32 (float64); contiguous if `rows` are given.
        lse: [b, h, s], float32 or float64. Over many merges, float32 loses a fifth of a kernel's accuracy: near 8 its
            spacing is 5e-7, which is the error of every weight.
        block_out: [s, b, h, d], or [len(rows), 1, h, d]; any float type, finite in every row.
        block_lse: [b, h, s], or [1, h, len(rows)]; float32 (float64).
        rows: places of the block's rows in [s * b], int64, each of them once; None: all.
    """
    if rows is not None:
        _merge_rows(out, lse, block_out, block_lse, rows)
        return
    share = torch.sigmoid(block_lse - lse).masked_fill_(block_lse == -torch.inf, 0.0)
    out.lerp_(block_out.to(out.dtype), share.to(out.dtype).permute(2, 0, 1).unsqueeze(-1))
    torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)


def _merge_rows(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, rows: Tensor) -> None:
    batch, flat = lse.shape[0], out.view(-1, 1, *out.shape[2:])
    at = rows % batch, slice(None), rows // batch
    part, part_lse = flat.index_select(0, rows), lse[at].T.unsqueeze(0).contiguous()
    merge_(part, part_lse, block_out, block_lse)
    flat.index_copy_(0, rows, part)
    lse[at] = part_lse[0].T
