"""Fused merge of a block's result into the running result: each value is read once and written once.

A program merges the results of some pairs of a row and a head. Its arithmetic is that of `merge.merge_`.
"""

import triton
import triton.language as tl
from torch import Tensor

PAIRS = 32  # of a row and a head, in a program


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    out,
    lse,
    block_out,
    block_lse,
    rows,
    pairs,
    batch,
    heads,
    out_s,
    out_b,
    out_h,
    lse_s,
    lse_b,
    lse_h,
    block_out_s,
    block_out_b,
    block_out_h,
    block_lse_s,
    block_lse_b,
    block_lse_h,
    HAS_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair < pairs
    place, head = pair // heads, pair % heads
    target = tl.load(rows + place, mask=is_pair, other=0) if HAS_ROWS else place
    s, b = target // batch, target % batch
    block_s, block_b = (place, place * 0) if HAS_ROWS else (s, b)

    lse_at = lse + s * lse_s + b * lse_b + head * lse_h
    block_lse_at = block_lse + block_s * block_lse_s + block_b * block_lse_b + head * block_lse_h
    old = tl.load(lse_at, mask=is_pair, other=0.0)
    new = tl.load(block_lse_at, mask=is_pair, other=0.0).to(old.dtype)
    nothing = float("-inf")
    # Of two times -inf the difference is no number; such a row is left as it is.
    share = tl.where(new == nothing, 0.0, 1.0 / (1.0 + tl.exp(old - new)))
    larger, smaller = tl.maximum(old, new), tl.minimum(old, new)
    total = tl.where(smaller == nothing, larger, larger + tl.log(1.0 + tl.exp(smaller - larger)))
    tl.store(lse_at, total, mask=is_pair)

    dim = tl.arange(0, DIMS)
    inside = is_pair[:, None] & (dim < DIM)[None, :]
    out_at = out + (s * out_s + b * out_b + head * out_h)[:, None] + dim[None, :]
    block_at = block_out + (block_s * block_out_s + block_b * block_out_b + head * block_out_h)[:, None] + dim[None, :]
    x = tl.load(out_at, mask=inside, other=0.0)
    y = tl.load(block_at, mask=inside, other=0.0).to(x.dtype)
    weight = share.to(x.dtype)[:, None]
    tl.store(out_at, tl.where(weight < 0.5, x + weight * (y - x), y - (1.0 - weight) * (y - x)), mask=inside)


def fused_merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, rows: Tensor | None = None) -> None:
    """Merge the result of a block into `out` and `lse`, in place; see `merge.merge_`.

    Args:
        out, lse, block_out, block_lse, rows: see `merge.merge_`.

    Raises:
        ValueError: The last dimension of `out` is not contiguous.
    """
    if out.stride(-1) != 1:
        raise ValueError(f"a running result of strides {out.stride()}: its last dimension must be contiguous")
    block_out = block_out if block_out.stride(-1) == 1 else block_out.contiguous()
    tokens = out.shape[0] * out.shape[1] if rows is None else rows.shape[0]
    pairs = tokens * out.shape[2]
    if pairs == 0:
        return
    grid = (triton.cdiv(pairs, PAIRS),)
    _merge[grid](
        out,
        lse,
        block_out,
        block_lse,
        lse if rows is None else rows,  # a pointer that is not read
        pairs,
        lse.shape[0],
        out.shape[2],
        *out.stride()[:3],
        *_by_row(lse),
        *block_out.stride()[:3],
        *_by_row(block_lse),
        HAS_ROWS=rows is not None,
        DIM=out.shape[3],
        DIMS=triton.next_power_of_2(out.shape[3]),
        PAIRS=PAIRS,
    )


def _by_row(lse: Tensor) -> tuple[int, int, int]:
    """Return the strides of log-sum-exps [b, h, s], that of the rows first."""
    batch, head, row = lse.stride()
    return row, batch, head
