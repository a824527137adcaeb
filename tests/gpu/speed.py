"""Tokens per second and model FLOPs utilisation of a 7B-like stack of upstream's layers, with our kernels and without.

    python -m tests.gpu.speed [--tokens N ...] [--groups G] [--layers N]

Without our kernels attention is upstream's own of the local spec, which holds the scores of the whole sequence: at long
sequences it does not fit, which is said. Model FLOPs are those of the layers' products and of causal attention, forward
and backward, of nothing that is recomputed. The stack has as many layers as fit with our kernels at the longest
sequence, and fewer where upstream's attention needs the room.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron.longseq.pipeline.plan.segment_cost import cells, flops
from tests.gpu.cost_of_splitting import layers_that_fit
from tests.gpu.emulated_ring import PEAK
from tests.gpu.figures import Report
from tests.gpu.stack import Sizes, build, forget, measure, one_rank

MODEL_LAYERS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = _options(arguments)
    report = Report()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with one_rank():
        for tokens in options.tokens:
            layers = options.layers or _layers(options, tokens)
            for splits in options.splits:
                _run_stack(report, f"ours, {tokens} tokens, K {splits}", options, layers, tokens, splits)
            fewer = layers
            while not _run_stack(report, f"upstream, {tokens} tokens, {fewer} layers", options, fewer, tokens, None):
                if fewer == 1:
                    break
                fewer = max(1, fewer // 4)
    return report.status()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.speed", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: give --layers and small sizes")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--layers", type=int, help="of the stack (default: as many as fit)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=32, help="key-value heads")
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return parser.parse_args(arguments)


def _sizes(options: argparse.Namespace, layers: int) -> Sizes:
    return Sizes(layers, options.hidden, options.heads, options.groups, options.ffn, options.dtype)


def _layers(options: argparse.Namespace, tokens: int) -> int:
    """Return how many layers fit, from the peaks of stacks of one and of two."""
    room, peaks = torch.cuda.mem_get_info()[0], []
    for layers in (1, 2):
        sizes = _sizes(options, layers)
        model = build(sizes, tokens)
        peaks.append(measure(model, sizes, (tokens,), 1)[0].peak_bytes)
        del model
        forget()
    return layers_that_fit(peaks[0], peaks[1], room, MODEL_LAYERS)


def _run_stack(
    report: Report, name: str, options: argparse.Namespace, layers: int, tokens: int, splits: int | None
) -> bool:
    """Measure one stack and tell it; False where it did not fit."""
    sizes = _sizes(options, layers)
    try:
        model = build(sizes, tokens)
        if splits is None:
            taken, peak = upstreams(model, sizes, tokens, options.repeats)
        else:
            lengths = (tokens // splits,) * splits
            found = measure(model, sizes, lengths, options.repeats)[0]
            taken, peak = found.seconds, found.peak_bytes
    except torch.OutOfMemoryError:
        report.tell(name, did_not_fit=True, layers=layers)
        return False
    finally:
        model = None
        forget()
    work = model_flops(sizes, tokens)
    figures: dict[str, Any] = {"layers": layers, "tokens_per_second": round(tokens / taken, 1)}
    figures |= {"tflops": round(work / taken / 1e12, 2), "peak_gib": round(peak / 2**30, 2)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    most = next((rate for key, rate in PEAK.items() if key in device), None)
    report.tell(name, **figures, mfu=round(work / taken / most, 4) if most else None)
    return True


def model_flops(sizes: Sizes, tokens: int) -> float:
    """Return the FLOPs of a step: the layers' products, and attention over the pairs that the causal mask lets see."""
    layer = flops(sizes.shape(tokens)).layer
    pairs = cells(0, tokens)
    return sizes.layers * (layer.forward(pairs, tokens) + layer.backward(pairs, tokens))


def upstreams(model: torch.nn.Module, sizes: Sizes, tokens: int, repeats: int) -> tuple[float, int]:
    """Return (median seconds, peak bytes) of forward and backward with upstream's own attention."""
    on_gpu, dtype = torch.cuda.is_available(), getattr(torch, sizes.dtype)
    given, pull = (torch.randn(tokens, 1, sizes.hidden).to(dtype).cuda() for _ in range(2))
    taken = []
    for number in range(repeats + 1):
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
            if number == 1:
                torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        model.set_input_tensor(given.detach().requires_grad_())  # type: ignore[operator]
        torch.autograd.backward(model(None, None, None), pull)
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:]), torch.cuda.max_memory_allocated() if on_gpu else 0


if __name__ == "__main__":
    sys.exit(main())
