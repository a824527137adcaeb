"""Attention kernels against float64: each of ours block by block, sequences in segments, and PyTorch's own backends.

    python -m tests.gpu.kernels [--device cpu] [--tiny]

An error is the norm of the difference over the norm of the exact result. A kernel's may be four times that of the
formula in the same type on the same device: kernels sum in another order, but keep scores in float32. Of segments each
result may have two more roundings than one call's. The last figures are milliseconds of every backend, forward and
backward.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel, Scores
from megatron.longseq.attention.kernels.flash_cuda import FlashAttn, FlashAttn3, TorchCudaFlash
from megatron.longseq.attention.kernels.reference import Reference, visible_mask
from megatron.longseq.attention.kernels.select import HOPPER
from megatron.longseq.attention.kernels.torch_cpu import CpuFlash
from megatron.longseq.attention.plan.ranges import Documents, DocumentSpan
from megatron.longseq.attention.runtime.kv_cache import SegmentKVCache
from tests.gpu.emulated_ring import seconds
from tests.gpu.figures import Report
from tests.unit.attention_bed import Split, oracle, qkv, seen, tensors

HEADS = {"MHA": (8, 8), "GQA": (8, 2), "MQA": (8, 1)}
SCORES = {
    "full": Scores(0.125),
    "causal": Scores(0.125, True),
    "window": Scores(0.125, True, 37),
    "one key": Scores(0.125, True, 0),
    "window of a ring": Scores(0.125, False, 50),
}
SIZES = [(1, 300), (128, 128), (100, 260), (513, 1030)]  # rows, keys
TINY_SIZES = [(1, 9), (16, 16), (12, 40)]
MANY = 4  # times the formula's error
SPEED = {False: (1, 8192, 32, 8, 128), True: (1, 64, 4, 2, 16)}  # batch, tokens, heads, groups, channels
ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and time all kernels."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.kernels", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*stores the whole score matrix")
    device, report = torch.device(options.device), Report()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kernel in kernels(device, dtype):
            for heads in HEADS:
                blocks(report, kernel, dtype, heads, device, TINY_SIZES if options.tiny else SIZES)
            split(report, kernel, dtype, device, 96 if options.tiny else 1024)
        backends(report, dtype, device, 64 if options.tiny else 1024)
    time_all(report, device, options.tiny)
    return report.status()


def kernels(device: torch.device, dtype: torch.dtype) -> Iterator[Kernel]:
    """Yield the kernels of this machine that take the type."""
    if device.type == "cpu":
        yield CpuFlash()
    elif dtype != torch.float32:
        yield TorchCudaFlash()
        is_hopper = torch.cuda.get_device_capability(device)[0] == HOPPER
        for made in (FlashAttn, FlashAttn3) if is_hopper else (FlashAttn,):
            try:
                yield made()
            except ImportError as error:
                print(f"{made.name}: {error}")
    yield Reference()


def formula(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scores: Scores) -> list[Tensor]:
    """Return out, dq, dk, dv by autograd in the tensors' own type, [s, b, h, d]; every row sees a key."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in leaves[1:])
    hidden = ~visible_mask(q.shape[0], k.shape[0], scores, q.device)
    logits = torch.einsum("sbhd,tbhd->bhst", leaves[0], keys) * scores.scale
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    out = torch.einsum("bhst,tbhd->sbhd", weights, values)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def relative(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return each result's error; where a result is nothing but rounding, beside the largest of the gradients."""
    sizes = [x.double().norm() for x in exact]
    sizes[1:] = [max(sizes[1:])] * 3
    pairs = zip(results, exact, sizes, strict=True)
    return [((a.double() - b.double()).norm() / size).item() for a, b, size in pairs]


def blocks(
    report: Report,
    kernel: Kernel,
    dtype: torch.dtype,
    heads: str,
    device: torch.device,
    sizes: Sequence[tuple[int, int]],
) -> None:
    """Compare forward and backward of one block, of every size and mask."""
    hq, hk = HEADS[heads]
    for mask, scores in SCORES.items():
        worst, allowed = 0.0, 0.0
        right = True
        for rows, keys in sizes:
            if scores.causal and scores.window is None and not kernel.rectangular:
                rows = keys  # noqa: PLW2901
            shapes = [(rows, 2, hq, 64), (keys, 2, hk, 64), (keys, 2, hk, 64), (rows, 2, hq, 64)]
            given = [x.to(device) for x in tensors(shapes, seed=rows, dtype=dtype)]
            exact = formula(*(x.double() for x in given), scores)
            out, lse = kernel.forward(*given[:3], scores)
            grads = kernel.backward(given[3], *given[:3], out, lse, scores)
            found, plain = relative([out, *grads], exact), relative(formula(*given, scores), exact)
            # Where a row sees one key the formula may be exact; nothing of this type is nearer than half an eps.
            most = MANY * max(*plain, torch.finfo(dtype).eps / 2)
            worst, allowed = max(worst, *found), max(allowed, most)
            right &= max(found) <= most and all(math.isfinite(x) for x in found)
        name = f"{kernel.name}, {_short(dtype)}, {heads}, {mask}"
        report.tell(name, error=_rounded(worst), allowed=_rounded(allowed), right=right)


def split(report: Report, kernel: Kernel, dtype: torch.dtype, device: torch.device, tokens: int) -> None:
    """Compare whole sequences and segments with unsplit attention: causal, a window, documents, both."""
    inputs = [x.to(device) for x in qkv(tokens, 2, (8, 2), 64, dtype=dtype)]
    cuts = (tokens // 3, tokens // 2 + 1)
    documents = Documents((_runs(0, cuts[0], cuts[1], tokens), _runs(0, 1, cuts[0], tokens)))
    for mask, kwargs in {
        "causal": {},
        "window": {"window": tokens // 10},
        "documents": {"documents": documents},
        "documents and window": {"documents": documents, "window": tokens // 10},
    }.items():
        hidden = seen(tokens, kwargs.get("window"))  # type: ignore[arg-type]
        if "documents" in kwargs:
            hidden = _documents_mask(hidden, documents)
        exact = oracle(inputs, hidden.to(device))
        floor = relative([x.to(dtype) for x in exact], exact)
        once = _segments(inputs, [tokens], kernel, kwargs)
        whole = relative(once, exact)
        for lengths in ([tokens], [tokens // 2] * 2, [tokens // 4] * 4, [tokens // 2 - 1, 1, tokens // 4, tokens // 4]):
            found = whole if len(lengths) == 1 else relative(_segments(inputs, lengths, kernel, kwargs), exact)
            # Of float32, every merge rounds three times, too, and a log-sum-exp: values up to 8, so four times as much.
            more = 2 + (3 + 4**2) * len(lengths) ** 2 * (dtype == torch.float32)
            limits = [math.sqrt(one**2 + more * least**2) for one, least in zip(whole, floor, strict=True)]
            worst = max(a / b for a, b in zip(found, limits, strict=True))
            name = f"{kernel.name}, {_short(dtype)}, segments {lengths}, {mask}"
            report.tell(name, errors=[_rounded(x) for x in found], of_allowed=round(worst, 3), right=worst <= 1)


def _segments(inputs: Sequence[Tensor], lengths: Sequence[int], kernel: Kernel, kwargs: dict[str, Any]) -> list[Tensor]:
    cache = SegmentKVCache()
    results = Split(inputs, lengths, cache, kernel, **kwargs).run().results()
    cache.assert_empty()
    return results


def _runs(*ends: int) -> tuple[DocumentSpan, ...]:
    return tuple(DocumentSpan(begin, end, begin) for begin, end in pairwise(ends))


def _documents_mask(causal: Tensor, documents: Documents) -> Tensor:
    masks = causal.repeat(len(documents.spans), 1, 1, 1)
    for mask, runs in zip(masks, documents.spans, strict=True):
        for run in runs:
            mask[:, run.begin : run.end, : run.start] = False
    return masks


def _backends() -> dict[str, Any]:
    from torch.nn.attention import SDPBackend

    names = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    return {name: getattr(SDPBackend, wanted) for name, wanted in names.items() if hasattr(SDPBackend, wanted)}


def _sdpa(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run causal attention of [s, b, h, d] by one backend of PyTorch's; keys repeated, for not all of them group."""
    from torch.nn.attention import sdpa_kernel

    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    with sdpa_kernel([backend]):
        heads_first = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).permute(2, 0, 1, 3)


def backends(report: Report, dtype: torch.dtype, device: torch.device, tokens: int) -> None:
    """Print the errors of PyTorch's backends for comparison. They are no part of this project, so none is a failure."""
    given = [x.to(device) for x in tensors([(tokens, 2, h, 64) for h in (8, 2, 2, 8)], dtype=dtype)]
    exact = formula(*(x.double() for x in given), Scores(64**-0.5, True))
    for name, backend in _backends().items():
        leaves = [x.clone().requires_grad_() for x in given[:3]]
        try:
            out = _sdpa(backend, *leaves)
            grads = torch.autograd.grad(out, leaves, given[3])
        except RuntimeError as error:
            report.tell(f"SDPA {name}, {_short(dtype)}", not_here=str(error).splitlines()[0][:120])
            continue
        errors = relative([out.detach(), *grads], exact)
        report.tell(f"SDPA {name}, {_short(dtype)}", errors=[_rounded(x) for x in errors])


def time_all(report: Report, device: torch.device, tiny: bool) -> None:
    """Print milliseconds of causal attention, forward and backward, for every backend and kernel."""
    batch, tokens, heads, groups, dim = SPEED[tiny]
    made = {"dtype": torch.bfloat16, "device": device}
    q, k, v, grad = (torch.randn(tokens, batch, h, dim, **made) for h in (heads, groups, groups, heads))  # type: ignore[call-overload]
    flops = 7 * batch * tokens**2 * heads * dim  # two products forward, five backward, half of the square

    scores = Scores(dim**-0.5, True)

    def tell(name: str, run: Callable[[], Any]) -> None:
        try:
            taken = seconds(run, device, 1 if tiny else ROUNDS)
        except RuntimeError as error:
            report.tell(f"speed, {name}", not_here=str(error).splitlines()[0][:120])
        else:
            report.tell(f"speed, {name}", milliseconds=round(1e3 * taken, 3), tflops=round(flops / taken / 1e12, 1))

    for kernel in kernels(device, torch.bfloat16):
        if kernel.name == Reference.name and not tiny:
            continue  # it stores the whole score matrix

        def ours(kernel: Kernel = kernel) -> None:
            out, lse = kernel.forward(q, k, v, scores)
            kernel.backward(grad, q, k, v, out, lse, scores)

        tell(kernel.name, ours)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for name, backend in _backends().items():
        if name == "math" and not tiny:
            continue
        tell(f"SDPA {name}", lambda b=backend: torch.autograd.grad(_sdpa(b, *leaves), leaves, grad))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(main())
