"""Measurements of one rank for a cluster's profile: products, memory, attention, kernel launches, collectives.

All ranks measure at the same time, because they share memory and, on a CPU, cores.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

_LAUNCHES = 18  # kernels of a layer's forward
_REPEATS = 3
_COLLECTIVES = 30  # calls of a collective, as many on every rank


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        products: m, n, k of the matrix products.
        moved: bytes of the tensor that an elementwise kernel reads and writes.
        attention: heads, length and channels of causal attention.
        messages: bytes of the collectives.
        elementwise: tokens, hidden size and width of the MLP of the elementwise kernels of a layer; None: they take as
            long as the memory needs for their bytes.
        seconds: budget of all measurements of a rank.
    """

    products: tuple[tuple[int, int, int], ...]
    moved: int
    attention: tuple[int, int, int]
    messages: tuple[int, ...]
    seconds: float
    elementwise: tuple[int, int, int] | None = None


CPU_SIZES = Sizes(
    products=(
        *((m, n, k) for m in (128, 512, 2048) for n in (256, 1024) for k in (256, 1024)),
        (256, 4096, 512),
        (2048, 512, 4096),
    ),
    moved=64 << 20,
    attention=(4, 1024, 64),
    messages=(16 << 10, 256 << 10, 4 << 20, 16 << 20),
    seconds=40.0,
    elementwise=(512, 256, 704),
)
GPU_SIZES = Sizes(
    products=(
        *((m, n, k) for m in (1024, 4096, 16384) for n in (1024, 4096, 12288) for k in (1024, 4096, 12288)),
        (4096, 32768, 4096),
        (8192, 8192, 28672),
    ),
    moved=1 << 30,
    attention=(32, 8192, 128),
    messages=(1 << 20, 16 << 20, 128 << 20, 512 << 20),
    seconds=60.0,
)


def time_of(run: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Return the seconds of a call, the median of several, within a budget of seconds.

    Args:
        run: the call; it runs once before it is timed.
        device: device of its kernels; a GPU is waited for.
        budget: seconds after which no further call starts; at least three calls are timed.
    """
    return statistics.median(_times(run, device, budget, _REPEATS))


def _times(run: Callable[[], Any], device: torch.device, budget: float, least: int) -> list[float]:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing
    run()
    synchronize()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or (time.perf_counter() - began < budget and len(times) < 50):
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def _nothing() -> None:
    return None


def measure(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, groups: Sequence[tuple[int, Any]]
) -> dict[str, Any]:
    """Return this rank's measurements.

    Args:
        sizes: what is measured.
        device: where.
        dtype: of products and attention.
        groups: process groups of this rank with their sizes, from 2 ranks on.
    """
    budget = sizes.seconds / (len(sizes.products) + 6 + len(groups) * len(sizes.messages))
    found: dict[str, Any] = {"products": []}
    for m, n, k in sizes.products:
        left, right = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        seconds = time_of(lambda a=left, b=right: a @ b, device, budget)
        found["products"].append([m, n, k, 2.0 * m * n * k / seconds / 1e12])
    if dtype.itemsize < 4:
        found["float32"] = _float32_rate(sizes.products[len(sizes.products) // 2], device, budget)
    tensor = torch.zeros(sizes.moved // 4, device=device)
    found["memory_bandwidth"] = 2.0 * sizes.moved / time_of(lambda: tensor.add_(1.0), device, budget)
    tiny = torch.zeros(8, device=device)
    found["layer_seconds"] = _LAUNCHES * time_of(lambda: [tiny.add_(1.0) for _ in range(100)], device, budget) / 100
    found["memory_efficiency"] = 1.0
    if sizes.elementwise:
        rate = _elementwise(sizes.elementwise, device, dtype, budget)
        found["memory_efficiency"] = rate / found["memory_bandwidth"]
    found["attention"] = _attention(sizes, device, dtype, budget)
    found["messages"] = [
        [size, message, _all_reduce(message, device, group, sizes.products[len(sizes.products) // 2])]
        for size, group in groups
        for message in sizes.messages
    ]
    return found


def _float32_rate(shape: tuple[int, int, int], device: torch.device, budget: float) -> float:
    """Return the TFLOP/s of a float32 product."""
    m, n, k = shape
    left, right = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    return 2.0 * m * n * k / time_of(lambda: left @ right, device, budget) / 1e12


def _elementwise(sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype, budget: float) -> float:
    """Return the bytes per second of a norm, a residual addition and SwiGLU, forward and backward.

    The bytes are those of `plan/compute.py`. On a CPU the kernels' instructions take longer than their memory.
    """
    tokens, hidden, width = sizes
    residual, gate, up = (torch.randn(tokens, n, device=device, dtype=dtype) for n in (hidden, width, width))
    inputs = [one.requires_grad_() for one in (residual, gate, up)]

    def once() -> None:
        normed = functional.rms_norm(residual, (hidden,)) + residual
        torch.autograd.grad([normed, functional.silu(gate) * up], inputs, [normed.detach(), gate.detach()])

    moved = dtype.itemsize * tokens * ((2 + 3 + 4 + 2) * hidden + (3 + 5) * width)
    return moved / time_of(once, device, budget)


def _attention(sizes: Sizes, device: torch.device, dtype: torch.dtype, budget: float) -> tuple[float, float]:
    """Return the FLOP/s of causal attention in forward and in backward, counting visible cells only."""
    heads, length, channels = sizes.attention
    shape = (1, heads, length, channels)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    out = forward()
    grad = torch.ones_like(out)
    with torch.no_grad():
        once = time_of(forward, device, budget)
    back = time_of(lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True), device, budget)
    work = 4.0 * heads * channels * length * (length + 1) / 2
    return work / once, 2.5 * work / back


def _all_reduce(size: int, device: torch.device, group: Any, shape: tuple[int, int, int]) -> float:
    """Return the seconds that an all-reduce adds to a product before it, but at least those that it takes alone.

    Between products, as in a layer, ranks wait for the last one, and a process has to be woken on a CPU. A step adds
    these waits up, so their mean counts.
    """
    m, n, k = shape
    tensor = torch.zeros(size // 4, device=device)
    left, right = torch.randn(m, k, device=device), torch.randn(k, n, device=device)

    def product() -> torch.Tensor:
        return left @ right

    def reduce() -> None:
        dist.all_reduce(tensor, group=group)

    def both() -> None:
        product()
        reduce()

    alone, reduced, together = (_times(run, device, 0.0, _COLLECTIVES) for run in (product, reduce, both))
    return max(statistics.median(reduced), statistics.mean(together) - statistics.mean(alone))
