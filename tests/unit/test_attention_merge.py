"""The fused merge in Triton's interpreter: equal to the merge by PyTorch's operators, and to float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.longseq.attention.kernels import select
from megatron.longseq.attention.kernels.merge import merge_
from tests.unit.attention_bed import tensors

ROOT = Path(__file__).resolve().parents[2]
INF = torch.inf
SIZES = [(7, 2, 3, 5), (17, 1, 2, 8)]  # rows, sequences, heads, dimension


def inputs(
    shape: tuple[int, int, int, int], out: torch.dtype, lse: torch.dtype, block: torch.dtype, rows: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Return a running result and a block's; some rows of either see no key."""
    s, b, h, d = shape
    block_shape = shape if rows is None else (len(rows), 1, h, d)
    x, y = tensors([shape, block_shape])
    sums = [10 * sum_ for sum_ in tensors([(b, h, s), (block_shape[1], h, block_shape[0])], seed=1)]
    sums[0][..., 0] = sums[0][..., -1] = -INF
    sums[1][..., 0] = sums[1][..., 1] = -INF
    return [
        x.to(out),
        sums[0].to(lse),
        y.to(block),
        sums[1].to(torch.float64 if block == torch.float64 else torch.float32),
    ], rows


def by_formula(given: list[Tensor], rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (out, lse) by exponentials in float64, one row at a time."""
    out, lse, block_out, block_lse = (x.double().clone() for x in given)
    batch = lse.shape[0]
    for place in range(out.shape[0] * batch if rows is None else len(rows)):
        target = place if rows is None else int(rows[place])
        row, sequence = divmod(target, batch)
        at = (row, sequence) if rows is None else (place, 0)
        old, new = lse[sequence, :, row], block_lse[at[1], :, at[0]]
        total = torch.stack([old, new]).logsumexp(0)
        shares = [torch.where(total == -INF, 0.0, (one - total).exp()).nan_to_num(0.0) for one in (old, new)]
        if (total > -INF).any():
            kept = torch.where(total == -INF, 1.0, shares[0])
            out[row, sequence] = kept[:, None] * out[row, sequence] + shares[1][:, None] * block_out[at]
        lse[sequence, :, row] = total
    return out, lse


TYPES = [
    (torch.float64, torch.float64, torch.float64),
    (torch.float32, torch.float64, torch.float32),
    (torch.float32, torch.float64, torch.bfloat16),
    (torch.float32, torch.float32, torch.float32),
]


def compare(merge: select.Merge) -> None:
    """Compare a merge with the formula for all sizes, types and rows, and layouts of memory."""
    for shape in SIZES:
        rows = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(0))[: shape[0]].sort().values
        for types in TYPES:
            for at in (None, rows):
                given, _ = inputs(shape, *types, at)
                expected = by_formula(given, at)
                if at is None:  # as slices of longer results, and as a kernel's permuted results
                    longer = torch.zeros(shape[0] + 3, shape[1] + 1, *shape[2:], dtype=given[0].dtype)
                    longer[3:, 1:] = given[0]
                    given[0] = longer[3:, 1:]
                    given[2] = given[2].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
                    given[3] = given[3].permute(2, 0, 1).contiguous().permute(1, 2, 0)
                merge(*given, at)
                for found, right in zip(given[:2], expected, strict=True):
                    eps = torch.finfo(found.dtype).eps
                    torch.testing.assert_close(found.double(), right, rtol=8 * eps, atol=8 * eps)


def test_merge_by_pytorchs_operators() -> None:
    compare(merge_)


def test_fused_merge_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    script = (
        "from megatron.longseq.attention.kernels.merge_triton import fused_merge_\n"
        "from tests.unit.test_attention_merge import compare\n"
        "compare(fused_merge_)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_merge_is_chosen_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = (select.select_merge.__wrapped__(device) for device in ("cpu", "cuda"))
    assert cpu.function is merge_ and "PyTorch's operators (device cpu)" in cpu.why
    pytest.importorskip("triton")
    assert cuda.function is not merge_ and cuda.why == "fused merge by Triton"
    given = [torch.zeros(3, 1, 2, 4), torch.zeros(1, 2, 3), torch.ones(3, 1, 2, 4), torch.ones(1, 2, 3)]
    found, expected = [x.clone() for x in given], [x.clone() for x in given]
    merge_(*expected)
    with pytest.warns(UserWarning, match="Triton cannot compile: "):  # there is no driver here
        cuda.function(*found)
    cuda.function(*given)
    assert all(torch.equal(*pair) for one in (found, given) for pair in zip(one, expected, strict=True))
    for name in ("triton", "megatron.longseq.attention.kernels.merge_triton"):
        monkeypatch.setitem(sys.modules, name, None)
    without = select.select_merge.__wrapped__("cuda")
    assert without.function is merge_ and "PyTorch's operators (not fused: " in without.why
