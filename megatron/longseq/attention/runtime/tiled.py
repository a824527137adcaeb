"""Attention by tiles: launch a kernel on their blocks, merge the results, and pass on the gradients of the keys.

The blocks of many documents are packed into a launch (`plan.launches`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel, accumulation_dtype
from megatron.longseq.attention.kernels.select import Merge, select_merge
from megatron.longseq.attention.plan.launches import Tiles
from megatron.longseq.attention.plan.ranges import TokenRange
from megatron.longseq.attention.runtime.packing import PackedLaunch

KeyGrads = Callable[[TokenRange, TokenRange, Tensor, Tensor], None]  # (sequences, keys, dk, dv)
Result = tuple[Tensor, Tensor]  # out, log-sum-exp


def tiled_forward(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
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
    merge = select_merge(q.device.type).function
    total = result
    for launch in tiles.launches:
        packed = PackedLaunch.of(launch, q.shape[1], q.device)
        dtype = _block_dtype(kernel, q, is_partial or launch.is_part)
        inputs = packed.rows.take(q), packed.keys.take(k), packed.keys.take(v)
        out, lse = packed.forward(kernel, *(x.to(dtype) for x in inputs), scale)
        if result is None and launch.begins:
            wide = is_partial or any(one.is_part for one in tiles.launches)
            total = _begin(total, packed, q, (out, lse), wide, torch.float64 if is_partial else lse.dtype)
            continue
        assert total is not None, "the first launches begin a result"
        _merge(merge, total, packed, out, lse)
    assert total is not None, "there is at least one tile"
    out_type = accumulation_dtype(q.dtype) if is_partial else q.dtype
    return total[0].to(out_type), total[1].to(torch.float64 if is_partial else accumulation_dtype(q.dtype))


def _begin(
    total: Result | None, packed: PackedLaunch, q: Tensor, block: Result, wide: bool, lse_type: torch.dtype
) -> Result:
    """Write the result of the first blocks of some rows, and return the result of all rows."""
    out, lse = block
    out_type = accumulation_dtype(q.dtype) if wide else q.dtype
    if total is None and packed.rows.covers(q):
        return out.to(out_type).contiguous(), lse.to(lse_type).contiguous()
    if total is None:
        total = (
            q.new_empty(*q.shape[:3], out.shape[-1], dtype=out_type),
            q.new_empty(q.shape[1], q.shape[2], q.shape[0], dtype=lse_type),
        )
    packed.rows.put(total[0], out)
    packed.put_lse(total[1], lse)
    return total


def _merge(merge: Merge, result: Result, packed: PackedLaunch, out: Tensor, lse: Tensor) -> None:
    """Merge the result of some blocks into that of all rows, in place."""
    rows = packed.rows
    if rows.index is None:
        merge(result[0][rows.rows.slice(), rows.batch.slice()], packed.take_lse(result[1]), out, lse, None)
    else:
        merge(result[0], result[1], out, lse, rows.index)


def tiled_backward(
    kernel: Kernel,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grad_out: Tensor,
    tiles: Tiles,
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
    is_sum = is_partial or any(launch.is_part for launch in tiles.launches)
    sum_type = accumulation_dtype(q.dtype) if is_sum else q.dtype
    for launch in tiles.launches:
        packed = PackedLaunch.of(launch, q.shape[1], q.device)
        dtype = _block_dtype(kernel, q, is_partial or launch.is_part or q.shape[2] != k.shape[2])
        inputs = [packed.rows.take(grad_out), packed.rows.take(q), packed.keys.take(k), packed.keys.take(v)]
        inputs = [x.to(dtype) for x in (*inputs, packed.rows.take(out))]
        grad_q, *grads = packed.backward(kernel, [*inputs, packed.take_lse(lse)], scale)
        del inputs
        sequences, keys, (grad_k, grad_v) = packed.spread_keys(grads, q.shape[1])
        del grads
        key_grads(sequences, keys, grad_k, grad_v)
        if dq is None and packed.rows.covers(q):
            dq = grad_q.to(sum_type)
            continue
        if dq is None:
            dq = torch.zeros_like(q, dtype=sum_type, memory_format=torch.contiguous_format)
        packed.rows.add(dq, grad_q)
    return dq if dq is None or is_partial else dq.to(q.dtype)


def _block_dtype(kernel: Kernel, q: Tensor, is_part_of_sum: bool) -> torch.dtype:
    """Return the type to compute a block in.

    Rounding parts to bfloat16 before they are summed and rounded again costs up to a quarter more error. PyTorch's CPU
    operator sums the gradients of query heads that share a key head in its input's type: up to twice the error.
    """
    return accumulation_dtype(q.dtype) if is_part_of_sum and kernel.wide else q.dtype
