"""Attention by tiles: blocks run through a kernel, partial results merged, gradients handed out block by block."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron.longseq.attention.blocks import Span, Tile
from megatron.longseq.attention.kernels.kernel import Kernel, Scores
from megatron.longseq.attention.merge import accumulation, merge_

KeyGrads = Callable[[Span, Span, Tensor, Tensor], None]  # (sequences, keys, dk, dv)


def attend(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out [sq, b, hq, dv] in q's type, contiguous; lse [b, hq, sq]) of tiles that cover every row once.

    Args:
        kernel: computes a block.
        q: [sq, b, hq, d].
        k: [keys, b, hk, d], at least as many keys as the tiles name; hk divides hq.
        v: [keys, b, hk, dv].
        tiles: see `blocks`.
        scale: factor of the scores.
    """
    if len(tiles) == 1:
        out, lse = _tile(kernel, q, k, v, tiles[0], scale)
        return out.to(q.dtype).contiguous(), lse
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[2], q.shape[0], dtype=accumulation(q.dtype))
    for tile in tiles:
        rows, batch = tile.rows.slice(), tile.batch.slice()
        out[rows, batch], lse[batch, :, rows] = _tile(kernel, q, k, v, tile, scale)
    return out, lse


def attend_first(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
) -> tuple[Tensor, Tensor]:
    """As `attend`, but other keys' results will be added by `attend_more_`: out in the accumulation type, lse in
    float64 (see `merge_`).
    """
    if len(tiles) == 1:
        out, lse = _tile(kernel, q, k, v, tiles[0], scale, is_part=True)
        return out.to(accumulation(q.dtype)).contiguous(), lse.double()
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=accumulation(q.dtype))
    lse = q.new_empty(q.shape[1], q.shape[2], q.shape[0], dtype=torch.float64)
    for tile in tiles:
        rows, batch = tile.rows.slice(), tile.batch.slice()
        out[rows, batch], lse[batch, :, rows] = _tile(kernel, q, k, v, tile, scale, is_part=True)
    return out, lse


def attend_more_(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float, out: Tensor, lse: Tensor
) -> None:
    """Merge what some rows get from further keys into their `out` and `lse`, in place; arguments as of `attend`."""
    for tile in tiles:
        rows, batch = tile.rows.slice(), tile.batch.slice()
        merge_(out[rows, batch], lse[batch, :, rows], *_tile(kernel, q, k, v, tile, scale, is_part=True))


def _tile(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, *, is_part: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of one tile; out in the accumulation type where blocks were merged."""
    batch = tile.batch.slice()
    parts = len(tile.blocks) > 1
    # Parts rounded to bfloat16 before they are merged and rounded again cost up to a quarter more error.
    dtype = accumulation(q.dtype) if (parts or is_part) and kernel.wide else q.dtype
    rows = q[tile.rows.slice(), batch].to(dtype)
    merged: tuple[Tensor, Tensor] | None = None
    for block in tile.blocks:
        keys = block.keys.slice()
        scores = Scores(scale, block.causal, block.window)
        out, lse = kernel.forward(rows, k[keys, batch].to(dtype), v[keys, batch].to(dtype), scores)
        if merged is None:
            merged = (out.to(accumulation(q.dtype)) if parts else out, lse)
        else:
            merge_(*merged, out, lse)
    assert merged is not None, "a tile has at least one block"
    return merged


def attend_backward(
    kernel: Kernel,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grad_out: Tensor,
    tiles: Sequence[Tile],
    scale: float,
    key_grads: KeyGrads,
) -> Tensor:
    """Return dq [sq, b, hq, d] in q's type; hand every block's dk and dv to `key_grads`.

    Args:
        kernel: computes a block.
        saved: q, k, v, out, lse; out and lse are those of *all* keys that a row saw, here or elsewhere.
        grad_out: [sq, b, hq, dv].
        tiles: those of the forward, or a part of them.
        scale: factor of the scores.
        key_grads: called with (sequences, keys, dk, dv) as often as keys are seen; adds them up.
    """
    q, k, v, out, lse = saved
    dq: Tensor | None = None if len(tiles) == 1 else torch.zeros_like(q)
    for tile in tiles:
        rows, batch = tile.rows.slice(), tile.batch.slice()
        part: Tensor | None = None
        for block in tile.blocks:
            keys = block.keys.slice()
            grad_q, grad_k, grad_v = kernel.backward(
                grad_out[rows, batch],
                q[rows, batch],
                k[keys, batch],
                v[keys, batch],
                out[rows, batch],
                lse[batch, :, rows],
                Scores(scale, block.causal, block.window),
            )
            key_grads(tile.batch, block.keys, grad_k, grad_v)
            if part is None:
                part = grad_q if len(tile.blocks) == 1 else grad_q.to(accumulation(q.dtype))
            else:
                part.add_(grad_q)
        assert part is not None, "a tile has at least one block"
        if dq is None:
            return part.to(q.dtype)
        dq[rows, batch] = part
    assert dq is not None
    return dq


def attend_backward_(
    kernel: Kernel,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grad_out: Tensor,
    tiles: Sequence[Tile],
    scale: float,
    key_grads: KeyGrads,
    dq: Tensor | None,
) -> Tensor | None:
    """As `attend_backward` of a part of a row's keys: adds to `dq`, in the accumulation type, in place; return it.

    Where there is none yet, the first block's begins the sum.
    """
    q, k, v, out, lse = saved
    dtype = accumulation(q.dtype) if kernel.wide else q.dtype
    for tile in tiles:
        rows, batch = tile.rows.slice(), tile.batch.slice()
        given = [x[rows, batch].to(dtype) for x in (grad_out, q, out)]
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
            if dq is None and grad_q.shape == q.shape:
                dq = grad_q.to(accumulation(q.dtype))
                continue
            if dq is None:
                dq = torch.zeros_like(q, dtype=accumulation(q.dtype))
            dq[rows, batch].add_(grad_q)
    return dq
