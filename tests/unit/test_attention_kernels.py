"""Block kernels, behind one interface, equal attention by autograd in float64."""

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.longseq.attention.kernels import select as choice
from megatron.longseq.attention.kernels.base import BackwardInputs, Kernel, PackedLengths, Scores
from megatron.longseq.attention.kernels.flash_cuda import CudaFlash, FlashAttn, FlashAttn3, TorchCudaFlash
from megatron.longseq.attention.kernels.merge import merge_
from megatron.longseq.attention.kernels.reference import Reference, visible_mask
from megatron.longseq.attention.kernels.select import KernelRequest, KernelSelector, select_kernel
from megatron.longseq.attention.kernels.torch_cpu import CpuFlash
from tests.unit.attention_bed import assert_close, tensors, worst
from tests.unit.flash_bed import early_flash_attn_3, flash_attn_2, flash_attn_3, install

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
SIZES = [(1, 1), (1, 9), (7, 7), (5, 12), (7, 12), (12, 5), (33, 70)]
SCORES = [Scores(0.3), Scores(0.3, True), Scores(0.3, True, 3), Scores(0.3, True, 0), Scores(0.3, False, 4)]


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Install a stand-in for flash-attn with its documented functions, computed by the reference."""
    module = flash_attn_2()
    install(monkeypatch, module)
    return module


@pytest.fixture(params=["cpu", "reference", "flash_attn interface", "flash_attn 3 interface", "an early flash_attn 3"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Return each kernel that runs on this machine."""
    if request.param == "cpu":
        return CpuFlash()
    if request.param == "reference":
        return Reference()
    if request.param == "flash_attn interface":
        request.getfixturevalue("flash_attn")
        return FlashAttn()
    install(monkeypatch, early_flash_attn_3() if "early" in request.param else flash_attn_3())
    return FlashAttn3()


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out, lse) by the formula, 0 and -inf for rows that see no key."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = (torch.einsum("sbhd,tbhd->bhst", q, k) * scale).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~mask, 0.0)
    return torch.einsum("bhst,tbhd->sbhd", weights, v), scores.logsumexp(-1)


def expected(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scores: Scores, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return out, lse, dq, dk, dv by autograd in a type."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    blind = max(0, q.shape[0] - k.shape[0]) if scores.causal else 0
    mask = visible_mask(q.shape[0], k.shape[0], scores, q.device)
    out, lse = exact(leaves[0][blind:], *leaves[1:], mask[blind:], scores.scale)
    grads = torch.autograd.grad(out, leaves, grad[blind:].to(dtype))
    pad = torch.nn.functional.pad
    full = pad(out.detach(), (0, 0) * 3 + (blind, 0))
    return [full, pad(lse.detach(), (blind, 0), value=-torch.inf), *grads]


def is_rectangle(sq: int, sk: int, scores: Scores) -> bool:
    """Return whether a kernel that is not `rectangular` refuses a block."""
    return scores.causal and scores.window is None and sq < sk


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_forward_and_backward_of_a_block(kernel: Kernel, heads: str, scores: Scores) -> None:
    hq, hk = HEADS[heads]
    for sq, sk in SIZES:
        q, k, v, grad = tensors([(sq, 2, hq, 8), (sk, 2, hk, 8), (sk, 2, hk, 8), (sq, 2, hq, 8)], seed=sq + sk)
        if isinstance(kernel, CudaFlash) and scores.window is not None and not scores.causal and sq > sk + 1:
            with pytest.raises(ValueError, match="flash kernels would mask keys of the first queries"):
                kernel.forward(q, k, v, scores)
            continue
        if isinstance(kernel, CpuFlash) and is_rectangle(sq, sk, scores):
            with pytest.raises(ValueError, match="PyTorch's CPU kernel needs equal numbers"):
                kernel.forward(q, k, v, scores)
            continue
        out, lse, *grads = expected(q, k, v, grad, scores)
        got, got_lse = kernel.forward(q, k, v, scores)
        assert got.dtype == got_lse.dtype == torch.float64 and got.shape == q.shape
        assert torch.equal(got_lse == -torch.inf, lse == -torch.inf)
        assert_close([got, got_lse.exp()], [out, lse.exp()], max(8, sk))
        assert_close(kernel.backward(grad, q, k, v, got, got_lse, scores), grads, max(8, sq, sk))


def test_mask_of_the_reference_is_bottom_right() -> None:
    for sq, sk, scores in itertools.product(range(1, 6), range(1, 6), SCORES):
        mask = visible_mask(sq, sk, scores, torch.device("cpu"))
        for row, key in itertools.product(range(sq), range(sk)):
            place = row + sk - sq
            wanted = (not scores.causal or key <= place) and (scores.window is None or key >= place - scores.window)
            assert bool(mask[row, key]) == wanted


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("parts", [[20], [7, 13], [1, 1, 18], [4, 4, 4, 4, 4]])
def test_parts_of_the_keys_merge_to_the_whole(kernel: Kernel, heads: str, parts: list[int]) -> None:
    """Forward parts merge by log-sum-exp. Backward of each part with the merged out and lse gives its exact share."""
    hq, hk = HEADS[heads]
    q, k, v, grad = tensors([(9, 2, hq, 8), (20, 2, hk, 8), (20, 2, hk, 8), (9, 2, hq, 8)])
    scores = Scores(0.3)
    out, lse, *grads = expected(q, k, v, grad, scores)
    merged, total = torch.zeros_like(q), torch.full_like(lse, -torch.inf)  # rows that saw nothing yet
    for keys, values in zip(k.split(parts), v.split(parts), strict=True):
        merge_(merged, total, *kernel.forward(q, keys, values, scores))
    assert_close([merged, total], [out, lse], 20)
    pieces = [
        kernel.backward(grad, q, keys, values, merged, total, scores)
        for keys, values in zip(k.split(parts), v.split(parts), strict=True)
    ]
    dq, dk, dv = zip(*pieces, strict=True)
    assert_close([sum(dq), torch.cat(dk), torch.cat(dv)], grads, 20)  # type: ignore[list-item]


def test_merge_of_rows_without_keys_and_of_huge_scores() -> None:
    inf = torch.inf
    cases = [  # lse, block's lse -> lse, share of the block
        (-inf, -inf, -inf, 0.0),
        (-inf, 2.0, 2.0, 1.0),
        (2.0, -inf, 2.0, 0.0),
        (1e4, -1e4, 1e4, 0.0),
        (-1e4, 1e4, 1e4, 1.0),
        (80.0, 80.0, 80.0 + torch.tensor(2.0).log().item(), 0.5),
    ]
    lse = torch.tensor([case[0] for case in cases]).view(1, 1, -1)
    out = torch.full((len(cases), 1, 1, 2), 3.0)
    merge_(out, lse, torch.full((len(cases), 1, 1, 2), 7.0), torch.tensor([c[1] for c in cases]).view(1, 1, -1))
    assert torch.equal(lse.flatten(), torch.tensor([case[2] for case in cases]))
    assert torch.allclose(
        out[:, 0, 0, 0], torch.tensor([3.0 + 4.0 * case[3] for case in cases]), atol=0, rtol=4 * 2**-24
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_types_of_results_and_error(dtype: torch.dtype, scores: Scores) -> None:
    sq = 70 if is_rectangle(40, 70, scores) else 40
    q, k, v, grad = tensors([(sq, 1, 4, 16), (70, 1, 2, 16), (70, 1, 2, 16), (sq, 1, 4, 16)], dtype=dtype)
    results = expected(q, k, v, grad, scores)
    formula = expected(q, k, v, grad, scores, dtype)  # of this type throughout, as this processor rounds it
    for kernel in (CpuFlash(), Reference()):
        out, lse = kernel.forward(q, k, v, scores)
        grads = kernel.backward(grad, q, k, v, out, lse, scores)
        assert {x.dtype for x in (out, *grads)} == {dtype} and lse.dtype == torch.float32
        # Kernels sum in another order and rescale what they have: four times as many roundings are no surprise.
        assert worst([out, lse, *grads], results) <= 4 * worst(formula, results)
    exactly = Reference(compute=torch.float64)
    out, _ = exactly.forward(q, k, v, scores)
    torch.testing.assert_close(
        out, results[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=0
    )  # a tie may go either way


def test_heads_that_lie_across_memory(kernel: Kernel) -> None:
    """PyTorch's operator alone computes wrong numbers if the last dimension is not contiguous."""
    q, k, v, grad = tensors([(9, 2, 4, 8)] * 4)
    scores = Scores(0.3, True)
    out, lse = kernel.forward(q, k, v, scores)
    grads = kernel.backward(grad, q, k, v, out, lse, scores)
    q, k, v, grad, out = (x.mT.contiguous().mT for x in (q, k, v, grad, out))
    assert q.stride(-1) != 1
    assert_close(kernel.forward(q, k, v, scores), [out, lse], 9)
    assert_close(kernel.backward(grad, q, k, v, out, lse, scores), grads, 9)
    ones = torch.ones(()).expand(9, 2, 4, 8).double()
    whole = kernel.backward(ones.contiguous(), q, k, v, out, lse, scores)
    assert_close(kernel.backward(ones, q, k, v, out, lse, scores), whole, 9)


def test_strided_views_are_taken_as_they_are() -> None:
    """Slices of a fused projection and of a longer buffer give the results of their copies."""
    fused, buffer, grad = tensors([(40, 2, 4, 24), (50, 2, 8, 8), (40, 2, 4, 8)], dtype=torch.float32)
    q, k, v = fused[..., :8], buffer[:40, :, :4], buffer[10:, :, 4:]
    scores, cpu = Scores(0.3, True), CpuFlash()
    out, lse = cpu.forward(q, k, v, scores)
    copies = [x.contiguous() for x in (q, k, v)]
    assert_close([out], cpu.forward(*copies, scores)[:1], 40, torch.float32)
    grads = cpu.backward(grad, q, k, v, out, lse, scores)
    assert_close(grads, cpu.backward(grad, *copies, out, lse, scores), 40, torch.float32)


def test_choice_says_what_and_why() -> None:
    cpu = torch.device("cpu")
    taken = select_kernel(cpu, torch.float32, 64)
    assert taken.kernel.name == "torch CPU flash" and "not flash_attn: device cpu" in taken.why
    dropped = select_kernel(cpu, torch.float32, 64, dropout=0.1)
    assert (
        dropped.kernel.dropout == 0.1
        and "not torch CPU flash: it has no attention dropout (0.1 is requested)" in dropped.why
    )
    with pytest.warns(UserWarning, match="values of 128 beside keys of 192.*it is slow and stores"):
        assert select_kernel(cpu, torch.float32, 192, value_dim=128).kernel.name == "reference"
    assert select_kernel(cpu, torch.float32, 64, only="reference").kernel.name == "reference"
    with pytest.raises(
        ValueError, match="not torch CUDA flash: device cpu; the kernels are flash_attn 3, flash_attn, "
    ):
        select_kernel(cpu, torch.float32, 64, only="torch CUDA flash")
    with pytest.raises(ValueError, match="there is no attention kernel 'fast'"):
        select_kernel(cpu, torch.float32, 64, only="fast")
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        select_kernel(cpu, torch.int64, 64)


def test_the_backend_of_upstreams_flag_limits_the_choice() -> None:
    cpu, odd = torch.device("cpu"), {"value_dim": 128}  # no flash kernel has values of 128 beside keys of 64
    for backend in ("unfused", "local"):
        with pytest.warns(UserWarning, match=f"reference .--attention-backend {backend}.*stores the whole score"):
            assert select_kernel(cpu, torch.float32, 64, backend=backend).kernel.name == "reference"
    assert select_kernel(cpu, torch.float32, 64, backend="flash").kernel.name == "torch CPU flash"
    with pytest.raises(ValueError, match=r"--attention-backend flash; .*values of 128 beside keys of 64"):
        select_kernel(cpu, torch.float32, 64, backend="flash", **odd)
    fused = select_kernel(cpu, torch.float32, 64, backend="fused")
    assert fused.kernel.name == "torch CPU flash" and "has no kernel of cuDNN" in fused.why
    selector, q = KernelSelector("a test"), torch.zeros(4, 1, 1, 64)
    assert [selector.select(q, q, name).name for name in ("flash", "auto")] == ["torch CPU flash"] * 2
    with pytest.warns(UserWarning, match="slow"):
        assert selector.select(q, q, "unfused").name == "reference"


def test_cuda_kernels_know_their_limits(flash_attn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object())
    fit: dict[str, Any] = {
        "device": "cuda", "dtype": torch.bfloat16, "head_dim": 128, "value_dim": 128, "dropout": 0.0
    }  # fmt: skip
    assert choice._against_package(KernelRequest(**fit)) is None and choice._against_cuda(KernelRequest(**fit)) is None
    for change, reason in (
        ({"dtype": torch.float32}, "torch.float32"),
        ({"head_dim": 84, "value_dim": 84}, "head size 84"),
        ({"head_dim": 264, "value_dim": 264}, "head size 264"),
        ({"dropout": 0.1}, "no attention dropout"),
        ({"value_dim": 64}, "values of 64"),
    ):
        assert reason in str(choice._against_package(KernelRequest(**{**fit, **change})))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "older than Ampere" in str(choice._against_package(KernelRequest(**fit)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    flash_attn._flash_attn_forward = lambda q, k, v, dropout_p, softmax_scale, causal, window_size: None  # 2.6
    assert "install flash-attn 2.7 or later" in str(choice._against_package(KernelRequest(**fit)))
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert choice._against_package(KernelRequest(**fit)) == "not installed"


def test_pytorchs_cuda_operator_takes_our_arguments() -> None:
    """The meta device checks names and types of arguments, and layouts of results. Values need a GPU (tests/gpu)."""
    kernel = TorchCudaFlash()
    q, k, v, grad = (
        torch.empty(s, 2, h, 64, dtype=torch.bfloat16, device="meta") for s, h in ((24, 4), (40, 2), (40, 2), (24, 4))
    )
    for scores in SCORES:
        out, lse = kernel.forward(q, k, v, scores)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 24), torch.float32)
        grads = kernel.backward(grad, q, k, v, out, lse, scores)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_hopper_takes_flash_attention_3(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flash_attn_3())
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object() if name in sys.modules else None)
    cuda = torch.device("cuda")
    for capability, name in (((9, 0), "flash_attn 3"), ((8, 0), "torch CUDA flash"), ((10, 0), "torch CUDA flash")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert select_kernel(cuda, torch.bfloat16, 128).kernel.name == name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    sys.modules["flash_attn_interface"]._flash_attn_backward = lambda dout, q, k: None  # type: ignore[attr-defined]
    taken = select_kernel(cuda, torch.bfloat16, 128)
    assert (
        taken.kernel.name == "torch CUDA flash"
        and "a function of dout, q, k, which is not FlashAttention 3's" in taken.why
    )


def test_pytorchs_cuda_operator_takes_packed_blocks() -> None:
    """On the meta device, as `test_pytorchs_cuda_operator_takes_our_arguments`."""
    kernel, lengths = TorchCudaFlash(), PackedLengths((3, 20, 1), (3, 30, 7))
    lengths.memo["offsets", torch.device("meta")] = tuple(
        torch.empty(4, dtype=torch.int32, device="meta") for _ in range(2)
    )
    q, k, v, grad = (
        torch.empty(s, 1, h, 64, dtype=torch.bfloat16, device="meta") for s, h in ((24, 4), (40, 2), (40, 2), (24, 4))
    )
    for scores in SCORES:
        out, lse = kernel.forward_packed(q, k, v, scores, lengths)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (1, 4, 24), torch.float32)
        grads = kernel.backward_packed(BackwardInputs(grad, q, k, v, out, lse), scores, lengths)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
