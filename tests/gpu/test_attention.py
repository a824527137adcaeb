"""Attention kernels and segments on a GPU: values against float64, and what splitting a sequence costs."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import BackwardInputs, Kernel, PackedLengths, Scores
from megatron.longseq.attention.kernels.flash_cuda import (
    FlashAttn,
    FlashAttn3,
    TorchCudaFlash,
    load_flash_attn,
    load_flash_attn_3,
)
from megatron.longseq.attention.kernels.merge import merge_
from megatron.longseq.attention.kernels.reference import Reference
from megatron.longseq.attention.kernels.select import HOPPER, select_kernel, select_merge
from megatron.longseq.attention.plan.ranges import Documents, DocumentSpan
from megatron.longseq.attention.runtime.kv_cache import SegmentKVCache
from tests.unit.attention_bed import Split, oracle, qkv, seen, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HEADS = {"MHA": (4, 4), "GQA": (8, 2), "MQA": (4, 1)}
SIZES = [(1, 1), (1, 300), (128, 128), (100, 260), (260, 100), (513, 1030)]
SCORES = [Scores(0.125), Scores(0.125, True), Scores(0.125, True, 37), Scores(0.125, True, 0), Scores(0.125, False, 50)]


def cuda(*xs: Tensor) -> list[Tensor]:
    """Move tensors to the GPU."""
    return [x.cuda() for x in xs]


@pytest.fixture(params=["torch", "flash_attn", "flash_attn 3"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Return each kernel of this machine."""
    if request.param == "torch":
        return TorchCudaFlash()
    try:
        if request.param == "flash_attn":
            load_flash_attn()
            return FlashAttn()
        load_flash_attn_3()
    except ImportError as error:
        pytest.skip(str(error))
    if torch.cuda.get_device_capability()[0] != HOPPER:
        pytest.skip("no Hopper")
    return FlashAttn3()


def relative(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest relative error, by norm."""
    pairs = zip(results, exact, strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9)).item() for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_forward_and_backward_of_a_block(kernel: Kernel, dtype: torch.dtype, heads: str, scores: Scores) -> None:
    hq, hk = HEADS[heads]
    exactly, narrow = Reference(compute=torch.float64), 8 * torch.finfo(dtype).eps
    for sq, sk in SIZES:
        shapes = [(sq, 2, hq, 64), (sk, 2, hk, 64), (sk, 2, hk, 64), (sq, 2, hq, 64)]
        q, k, v, grad = cuda(*tensors(shapes, seed=sq, dtype=dtype))
        if scores.window is not None and not scores.causal and sq > sk + 1:
            with pytest.raises(ValueError, match="flash kernels would mask keys"):
                kernel.forward(q, k, v, scores)
            continue
        out, lse = exactly.forward(*(x.double() for x in (q, k, v)), scores)
        exact = exactly.backward(*(x.double() for x in (grad, q, k, v)), out, lse, scores)
        got, got_lse = kernel.forward(q, k, v, scores)
        assert got_lse.dtype == torch.float32 and torch.equal(got_lse == -torch.inf, lse == -torch.inf)
        assert torch.isfinite(got).all() and relative([got, got_lse.exp()], [out, lse.exp()]) < narrow
        # A narrow window leaves dq and dk nothing but rounding where a row sees one key: measure against all three.
        grads = kernel.backward(grad, q, k, v, got, got_lse, scores)
        size = max(x.norm() for x in exact)
        for mine, right in zip(grads, exact, strict=True):
            assert mine.dtype == dtype and ((mine.double() - right).norm() / size).item() < narrow


@pytest.mark.parametrize("dim", [8, 40, 80, 96, 128, 192, 256])
def test_head_sizes_of_a_fused_projection(kernel: Kernel, dim: int) -> None:
    """Queries, keys and values are slices of one tensor, and the gradient is a transposed one."""
    fused, grad = cuda(*tensors([(200, 2, 4, 3 * dim), (2, 200, 4, dim)], dtype=torch.bfloat16))
    q, k, v = fused.split(dim, -1)
    grad, scores = grad.transpose(0, 1), Scores(dim**-0.5, True)
    exactly, narrow = Reference(compute=torch.float64), 8 * torch.finfo(torch.bfloat16).eps
    out, lse = exactly.forward(*(x.double() for x in (q, k, v)), scores)
    exact = exactly.backward(*(x.double() for x in (grad, q, k, v)), out, lse, scores)
    got, got_lse = kernel.forward(q, k, v, scores)
    assert relative([got, got_lse.exp()], [out, lse.exp()]) < narrow
    assert relative(kernel.backward(grad, q, k, v, got, got_lse, scores), exact) < narrow


PACKED = {  # scores, keys of a block of so many rows
    "causal": (Scores(0.125, True), lambda rows: rows),
    "causal with earlier keys": (Scores(0.125, True), lambda rows: rows + 100),
    "full": (Scores(0.125), lambda rows: 2 * rows),
    "window": (Scores(0.125, True, 37), lambda rows: rows),
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", PACKED)
def test_packed_blocks_are_blocks_one_by_one(kernel: Kernel, heads: str, mask: str) -> None:
    """One call for many documents is compared with float64; errors are relative to the largest gradient."""
    (hq, hk), (scores, keys_of) = HEADS[heads], PACKED[mask]
    rows = (1, 2, 3, 5, 300, 7, 1, 128, 513, 11)
    lengths = PackedLengths(rows, tuple(keys_of(length) for length in rows))
    t, s = sum(lengths.rows), sum(lengths.keys)
    shapes = [(t, 1, hq, 64), (s, 1, hk, 64), (s, 1, hk, 64), (t, 1, hq, 64)]
    q, k, v, grad = cuda(*tensors(shapes, dtype=torch.bfloat16))
    exactly, narrow = Reference(compute=torch.float64), 8 * torch.finfo(torch.bfloat16).eps
    out, lse = exactly.forward_packed(*(x.double() for x in (q, k, v)), scores, lengths)
    exact = exactly.backward_packed(BackwardInputs(*(x.double() for x in (grad, q, k, v)), out, lse), scores, lengths)
    got, got_lse = kernel.forward_packed(q, k, v, scores, lengths)
    assert relative([got, got_lse.exp()], [out, lse.exp()]) < narrow
    size = max(x.norm() for x in exact)
    given = BackwardInputs(grad, q, k, v, got, got_lse)
    for mine, right in zip(kernel.backward_packed(given, scores, lengths), exact, strict=True):
        assert ((mine.double() - right).norm() / size).item() < narrow


def test_fused_merge_is_the_merge_by_operators() -> None:
    merge = pytest.importorskip("megatron.longseq.attention.kernels.merge_triton").fused_merge_
    assert select_merge("cuda").function is not merge_, select_merge("cuda").why
    for batch, rows in (
        (2, None),
        (1, torch.arange(5, 400, 3, device="cuda")),
        (3, torch.arange(1, 900, 2, device="cuda")),
    ):
        shape = (400, batch, 8, 80)
        block = shape if rows is None else (len(rows), 1, 8, 80)
        out, block_out = cuda(*tensors([shape, block], dtype=torch.float32))
        lse, block_lse = (10 * x for x in cuda(*tensors([(batch, 8, 400), (block[1], 8, block[0])])))
        lse[..., :9] = block_lse[..., ::5] = -torch.inf
        given = [out, lse, block_out.bfloat16(), block_lse.float()]
        fused, plain = ([x.clone() for x in given] for _ in range(2))
        merge(*fused, rows)
        merge_(*plain, rows)
        torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fused[1], plain[1], rtol=1e-12, atol=1e-12)


def test_parts_of_the_keys_merge_to_the_whole(kernel: Kernel) -> None:
    shapes = [(96, 2, 8, 64), (400, 2, 2, 64), (400, 2, 2, 64), (96, 2, 8, 64)]
    q, k, v, grad = cuda(*tensors(shapes, dtype=torch.bfloat16))
    scores = Scores(0.125)
    exactly = Reference(compute=torch.float64)
    out, lse = exactly.forward(*(x.double() for x in (q, k, v)), scores)
    exact = exactly.backward(*(x.double() for x in (grad, q, k, v)), out, lse, scores)
    merged = torch.zeros_like(q, dtype=torch.float32)
    total = torch.full(lse.shape, -torch.inf, device="cuda")
    parts = list(zip(k.split([7, 200, 193]), v.split([7, 200, 193]), strict=True))
    for keys, values in parts:
        merge_(merged, total, *kernel.forward(q, keys, values, scores))
    assert relative([merged, total], [out, lse]) < 8e-3
    pieces = [kernel.backward(grad, q, *part, merged.bfloat16(), total, scores) for part in parts]
    dq, dk, dv = zip(*pieces, strict=True)
    assert relative([sum(x.float() for x in dq), torch.cat(dk), torch.cat(dv)], exact) < 2e-2  # type: ignore[list-item]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 100])
def test_segments_equal_unsplit_attention(kernel: Kernel, heads: str, window: int | None) -> None:
    inputs = cuda(*qkv(1024, 2, HEADS[heads], 64, dtype=torch.bfloat16))
    exact = oracle(inputs, seen(1024, window).cuda())
    whole = relative(Split(inputs, [1024], SegmentKVCache(), kernel, window=window).run().results(), exact)
    for lengths in ([512, 512], [300, 400, 1, 323], [128] * 8):
        cache = SegmentKVCache()
        split = Split(inputs, lengths, cache, kernel, window=window).run()
        # dk and dv are sums of rounded parts (one call rounds once): at most twice the rounding in the square.
        assert relative(split.results(), exact) < 1.5 * whole
        cache.assert_empty()


def test_documents_do_not_make_the_host_wait(kernel: Kernel) -> None:
    """Every micro-batch has other documents, whose offsets and indices are copied to the device."""
    inputs = cuda(*qkv(1024, 2, (8, 2), 64, dtype=torch.bfloat16))

    def run(border: int) -> None:
        spans = tuple(
            tuple(DocumentSpan(begin, end, begin) for begin, end in pairwise((0, first, *range(50, 1000, 50), 1024)))
            for first in (border, border + 1)
        )
        cache = SegmentKVCache()
        Split(inputs, [512, 512], cache, kernel, documents=Documents(spans), window=100).run()
        cache.assert_empty()

    run(7)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dropout_draws_the_same_mask_in_backward() -> None:
    """The output is linear in v, so with the mask of the forward <dv, v> = <grad, out>."""
    inputs = cuda(*qkv(64, 2, (4, 2), 16))
    torch.cuda.manual_seed(1)
    kernel = select_kernel(torch.device("cuda"), torch.float64, 16, dropout=0.5).kernel
    out, _, _, dv = Split(inputs, [30, 20, 14], SegmentKVCache(), kernel).run().results()
    left, right = (dv * inputs[2]).sum(), (out * inputs[3]).sum()
    assert abs((left - right) / right).item() < 1e-9


def test_what_splitting_costs(kernel: Kernel, tell: Callable[[str], None]) -> None:
    inputs = cuda(*qkv(32768, 1, (32, 8), 128, dtype=torch.bfloat16))

    def milliseconds(lengths: list[int]) -> float:
        times, cache = [], SegmentKVCache()
        for _ in range(4):
            split = Split(inputs, lengths, cache, kernel)
            first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            split.run()
            second.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(second))
        return min(times)

    whole = milliseconds([32768])
    for count in (2, 4, 8):
        cost = milliseconds([32768 // count] * count) / whole
        tell(f"{torch.cuda.get_device_name()}, {kernel.name}, 32k tokens: {count} segments cost {cost:.3f} of one call")
