"""Attention by tiles: blocks run through a kernel, partial results merged, gradients handed out block by block.

There is one loop for the forward and one for the backward, whether the tiles are all that their rows see or a part.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel, Scores
from megatron.longseq.attention.plan.tiles import Span, Tile
from megatron.longseq.attention.runtime.merge import accumulation, merge_

KeyGrads = Callable[[Span, Span, Tensor, Tensor], None]  # (sequences, keys, dk, dv)
Result = tuple[Tensor, Tensor]  # out, log-sum-exp


def attend(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Sequence[Tile],
    scale: float,
    *,
    is_part: bool = False,
    result: Result | None = None,
) -> Result:
    """Return (out [sq, b, hq, dv] in q's type, contiguous; lse [b, hq, sq]) of tiles that cover every row once.

    Args:
        kernel: computes a block.
        q: [sq, b, hq, d].
        k: [keys, b, hk, d], at least as many keys as the tiles name; hk divides hq.
        v: [keys, b, hk, dv].
        tiles: see `blocks`.
        scale: factor of the scores.
        is_part: results of further keys will be merged into this one: out is left in the accumulation type, lse is in
            float64 (see `merge_`).
        result: of earlier keys, as `is_part` returns it: merged into in place, and returned. Tiles may then leave rows
            out.
    """
    is_part = is_part or result is not None
    begins = result is None
    for tile in tiles:
        rows, batch = tile.rows.slice(), tile.batch.slice()
        dtype = _type(kernel, q, is_part or len(tile.blocks) > 1)
        given = q[rows, batch].to(dtype)
        merged = (result[0][rows, batch], result[1][batch, :, rows]) if result is not None and not begins else None
        for block in tile.blocks:
            keys = block.keys.slice()
            scores = Scores(scale, block.causal, block.window)
            out, lse = kernel.forward(given, k[keys, batch].to(dtype), v[keys, batch].to(dtype), scores)
            if merged is None:
                merged = (out.to(accumulation(q.dtype)) if len(tile.blocks) > 1 else out, lse)
            else:
                merge_(*merged, out, lse)
        if not begins:
            continue
        assert merged is not None, "a tile has at least one block"
        out_type = accumulation(q.dtype) if is_part else q.dtype
        lse_type = torch.float64 if is_part else accumulation(q.dtype)
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


def attend_backward(
    kernel: Kernel,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grad_out: Tensor,
    tiles: Sequence[Tile],
    scale: float,
    key_grads: KeyGrads,
    *,
    is_part: bool = False,
    dq: Tensor | None = None,
) -> Tensor | None:
    """Return dq [sq, b, hq, d] in q's type, None where there are no tiles; hand every block's dk and dv out.

    Where a gradient is a sum of several blocks' or of several query heads' of a group, a wide kernel is given float32,
    so that no part of the sum is rounded: for as long as a tile is computed, q, k, v, out and the gradient are there in
    float32, too.

    Args:
        kernel: computes a block.
        saved: q, k, v, out, lse; out and lse are those of *all* keys that a row saw, here or elsewhere.
        grad_out: [sq, b, hq, dv].
        tiles: those of the forward, or a part of them.
        scale: factor of the scores.
        key_grads: called with (sequences, keys, dk, dv) as often as keys are seen; adds them up.
        is_part: gradients from further keys will be added to this one: dq is left in the accumulation type.
        dq: from other keys, in the accumulation type: added to in place, and returned. Tiles may then leave rows out.
    """
    q, k, v, out, lse = saved
    is_part = is_part or dq is not None
    total_type = accumulation(q.dtype) if is_part else q.dtype
    for tile in tiles:
        rows, batch = tile.rows.slice(), tile.batch.slice()
        several = len(tile.blocks) > 1
        dtype = _type(kernel, q, is_part or several or q.shape[2] != k.shape[2])
        given = [x[rows, batch].to(dtype) for x in (grad_out, q, out)]
        part: Tensor | None = None
        for block in tile.blocks:
            keys = block.keys.slice()
            grad_q, grad_k, grad_v = kernel.backward(
                given[0],
                given[1],
                k[keys, batch].to(dtype),
                v[keys, batch].to(dtype),
                given[2],
                lse[batch, :, rows],
                Scores(scale, block.causal, block.window),
            )
            key_grads(tile.batch, block.keys, grad_k, grad_v)
            if part is None:
                part = grad_q.to(accumulation(q.dtype)) if several else grad_q
            else:
                part.add_(grad_q)
        assert part is not None, "a tile has at least one block"
        if dq is None and part.shape == q.shape:
            dq = part.to(total_type)
            continue
        if dq is None:
            dq = torch.zeros_like(q, dtype=total_type)
        dq[rows, batch].add_(part)
    return dq


def _type(kernel: Kernel, q: Tensor, is_part: bool) -> torch.dtype:
    """Return the type to compute a block in.

    Parts rounded to bfloat16 before they are added and rounded again cost up to a quarter more error. PyTorch's CPU
    operator adds up the gradients of a group's query heads in the type that it is given: up to twice the error.
    """
    return accumulation(q.dtype) if is_part and kernel.wide else q.dtype
