"""Attention by tiles: run blocks through a kernel, merge their results, and pass on the gradients of their keys."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel, Scores, accumulation_dtype
from megatron.longseq.attention.plan.ranges import TokenRange
from megatron.longseq.attention.plan.tiles import Tile

KeyGrads = Callable[[TokenRange, TokenRange, Tensor, Tensor], None]  # (sequences, keys, dk, dv)
Result = tuple[Tensor, Tensor]  # out, log-sum-exp


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge the result of a block into `out` and `lse`, in place.

    Rows that see no key of the block (log-sum-exp of -inf) are unchanged; rows that saw no key before take the block's
    result.

    Args:
        out: [s, b, h, d], float32 (float64).
        lse: [b, h, s], float32 or float64. Over many merges, float32 loses a fifth of a kernel's accuracy: near 8 its
            spacing is 5e-7, which is the error of every weight.
        block_out: [s, b, h, d], any float type, finite in every row.
        block_lse: [b, h, s], float32 (float64).
    """
    share = torch.sigmoid(block_lse - lse).masked_fill_(block_lse == -torch.inf, 0.0)
    out.lerp_(block_out.to(out.dtype), share.to(out.dtype).permute(2, 0, 1).unsqueeze(-1))
    torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)


def tiled_forward(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Sequence[Tile],
    scale: float,
    *,
    is_partial: bool = False,
    result: Result | None = None,
) -> Result:
    """Compute attention over the blocks of some tiles.

    Args:
        kernel: computes a block.
        q: [sq, b, hq, d].
        k: [keys, b, hk, d], with all keys that the tiles name; hk divides hq.
        v: [keys, b, hk, dv].
        tiles: cover every row once, unless `result` is given.
        scale: factor of the scores.
        is_partial: results of further keys will be merged into this one. It stays in the accumulation type, and its
            log-sum-exp is in float64 (see `merge_`).
        result: partial result of earlier keys; merged into in place and returned.

    Returns:
        out [sq, b, hq, dv], contiguous, in the type of q (in the accumulation type if partial), and lse [b, hq, sq] in
        the accumulation type (in float64 if partial).
    """
    is_partial = is_partial or result is not None
    begins = result is None
    for tile in tiles:
        rows, batch = tile.rows.slice(), tile.batch.slice()
        dtype = _block_dtype(kernel, q, is_partial or len(tile.blocks) > 1)
        block_q = q[rows, batch].to(dtype)
        merged = (result[0][rows, batch], result[1][batch, :, rows]) if result is not None and not begins else None
        for block in tile.blocks:
            keys = block.keys.slice()
            scores = Scores(scale, block.causal, block.window)
            out, lse = kernel.forward(block_q, k[keys, batch].to(dtype), v[keys, batch].to(dtype), scores)
            if merged is None:
                merged = (out.to(accumulation_dtype(q.dtype)) if len(tile.blocks) > 1 else out, lse)
            else:
                merge_(*merged, out, lse)
        if not begins:
            continue
        assert merged is not None, "a tile has at least one block"
        out_type = accumulation_dtype(q.dtype) if is_partial else q.dtype
        lse_type = torch.float64 if is_partial else accumulation_dtype(q.dtype)
        if len(tiles) == 1:
            return merged[0].to(out_type).contiguous(), merged[1].to(lse_type)
        if result is None:
            result = (
                q.new_empty(*q.shape[:3], v.shape[-1], dtype=out_type),
                q.new_empty(q.shape[1], q.shape[2], q.shape[0], dtype=lse_type),
            )
        result[0][rows, batch], result[1][batch, :, rows] = merged
    assert result is not None, "there is at least one tile"
    return result


def tiled_backward(
    kernel: Kernel,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grad_out: Tensor,
    tiles: Sequence[Tile],
    scale: float,
    key_grads: KeyGrads,
    *,
    is_partial: bool = False,
    dq: Tensor | None = None,
) -> Tensor | None:
    """Compute the gradients of `tiled_forward`.

    Where a gradient is a sum over several blocks, or over query heads that share a key head, a `wide` kernel computes
    in float32 so that no part of the sum is rounded. The tile's q, k, v, out and gradient then exist in float32, too.

    Args:
        kernel, scale: see `tiled_forward`.
        saved: q, k, v, out, lse; out and lse are those of all keys that a row sees, here or on other ranks.
        grad_out: [sq, b, hq, dv].
        tiles: tiles of the forward, or some of them.
        key_grads: called with (sequences, keys, dk, dv) of every block; sums them.
        is_partial: gradients from further keys will be added. dq stays in the accumulation type.
        dq: gradient from other keys in the accumulation type; added to in place and returned.

    Returns:
        dq [sq, b, hq, d] in the type of q (in the accumulation type if partial); None if there are no tiles.
    """
    q, k, v, out, lse = saved
    is_partial = is_partial or dq is not None
    dq_type = accumulation_dtype(q.dtype) if is_partial else q.dtype
    for tile in tiles:
        rows, batch = tile.rows.slice(), tile.batch.slice()
        several = len(tile.blocks) > 1
        dtype = _block_dtype(kernel, q, is_partial or several or q.shape[2] != k.shape[2])
        block_grad, block_q, block_out = (x[rows, batch].to(dtype) for x in (grad_out, q, out))
        tile_dq: Tensor | None = None
        for block in tile.blocks:
            keys = block.keys.slice()
            grad_q, grad_k, grad_v = kernel.backward(
                block_grad,
                block_q,
                k[keys, batch].to(dtype),
                v[keys, batch].to(dtype),
                block_out,
                lse[batch, :, rows],
                Scores(scale, block.causal, block.window),
            )
            key_grads(tile.batch, block.keys, grad_k, grad_v)
            if tile_dq is None:
                tile_dq = grad_q.to(accumulation_dtype(q.dtype)) if several else grad_q
            else:
                tile_dq.add_(grad_q)
        assert tile_dq is not None, "a tile has at least one block"
        if dq is None and tile_dq.shape == q.shape:
            dq = tile_dq.to(dq_type)
            continue
        if dq is None:
            dq = torch.zeros_like(q, dtype=dq_type)
        dq[rows, batch].add_(tile_dq)
    return dq


def _block_dtype(kernel: Kernel, q: Tensor, is_part_of_sum: bool) -> torch.dtype:
    """Return the type to compute a block in.

    Rounding parts to bfloat16 before they are summed and rounded again costs up to a quarter more error. PyTorch's CPU
    operator sums the gradients of query heads that share a key head in its input's type: up to twice the error.
    """
    return accumulation_dtype(q.dtype) if is_part_of_sum and kernel.wide else q.dtype
