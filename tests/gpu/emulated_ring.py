"""What a ring costs beside one flash call, without a wire: forward and backward of attention on one device.

    python -m tests.gpu.emulated_ring [--out FILE]             # a GPU: 32k, 64k, 128k tokens, R 2, 4, 8, bf16

The blocks of every rank are computed one rank after another, as a ring computes them, with keys that lie here already:
what is measured is more and smaller kernel calls, merging, and adding up gradients. Over it stands one flash call on
the whole sequence. Beside that: packing for the all-to-all in bytes per second, next to a plain copy; and model FLOPs
utilisation of a rank's share of a 7B-like layer. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.longseq.attention.kernels.base import Kernel
from megatron.longseq.attention.kernels.select import select_kernel
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ranges import TokenRange
from megatron.longseq.attention.plan.ring_schedule import Ring, plan_ring_attention
from megatron.longseq.attention.plan.tiles import Mask, plan_causal
from megatron.longseq.attention.runtime.comm import Message
from megatron.longseq.attention.runtime.ring import RingChannels, ring_backward, ring_forward
from megatron.longseq.attention.runtime.tiled import tiled_backward, tiled_forward
from megatron.longseq.attention.runtime.ulysses import Ulysses

# Dense bf16 FLOP/s, from the makers' data sheets.
PEAK = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}


class NoWire:
    """A lane whose messages are there at once, with whatever the memory held."""

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> "NoWire":
        """See `channels.P2PChannel.post`."""
        return self

    def wait(self) -> None:
        """Do nothing, because no message is in flight."""

    def all_to_all(self, sent: Tensor) -> Tensor:
        """See `channels.GroupCollectives.all_to_all`."""
        return torch.empty_like(sent)


@dataclass(frozen=True)
class Sizes:
    """One setting: a batch of one sequence."""

    tokens: int
    heads: int
    groups: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def tensors(self, tokens: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Return q, keys and values, and the gradient of the output."""
        heads = (self.heads, self.groups, self.groups, self.heads)
        q, k, v, grad = (torch.randn(tokens, 1, h, self.dim, dtype=self.dtype, device=self.device) for h in heads)
        return q, (k, v), grad

    @property
    def flops(self) -> float:
        """Return the FLOPs of causal attention: two products forward, five backward, half of the square."""
        return 7 * self.tokens**2 * self.heads * self.dim


def seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Return the median seconds of a run, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        _settle(device)
        start = time.perf_counter()
        run()
        _settle(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def whole(sizes: Sizes, kernel: Kernel) -> Callable[[], None]:
    """Return a run of one flash call on the whole sequence."""
    q, (k, v), grad = sizes.tensors(sizes.tokens)
    tiles, scale = plan_causal(TokenRange(0, sizes.tokens), Mask(1), rectangular=kernel.rectangular), sizes.dim**-0.5

    def run() -> None:
        out, lse = tiled_forward(kernel, q, k, v, tiles, scale)
        tiled_backward(kernel, (q, k, v, out, lse), grad, tiles, scale, lambda *_: None)

    return run


def ring(sizes: Sizes, kernel: Kernel, ranks: int) -> list[Callable[[], None]]:
    """Return the runs of every rank of a ring."""
    layout, channels, scale = Layout(Mesh(1, ranks), (sizes.tokens,)), RingChannels(*[NoWire()] * 4), sizes.dim**-0.5
    shards = layout.shards(range(1))
    q, kv, grad = sizes.tensors(sizes.tokens // ranks)

    def of_rank(rank: int) -> Callable[[], None]:
        steps = plan_ring_attention(Ring(ranks, ranks), shards, shards, Mask(1), rank, rectangular=kernel.rectangular)

        def run() -> None:
            out, lse = ring_forward(kernel, q, kv, steps, channels, scale)
            ring_backward(kernel, (q, kv, out, lse), grad, steps, channels, scale)

        return run

    return [of_rank(rank) for rank in range(ranks)]


def packing(sizes: Sizes, ulysses: int, rounds: int) -> dict[str, float]:
    """Return the bytes per second of packing and unpacking for the all-to-all, and of a copy of as much."""
    tokens = sizes.tokens // ulysses
    received_rows = Layout(Mesh(ulysses, 1), (sizes.tokens,)).received_rows(range(1))
    exchange = Ulysses(ulysses, Heads(sizes.heads, sizes.groups), received_rows, NoWire())  # type: ignore[arg-type]
    q, (k, v), _ = sizes.tensors(tokens)
    sent = exchange.heads.sent(ulysses) * tokens * sizes.dim * q.element_size()
    plain = torch.empty(sent, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(plain)
    # Each is read once and written once per copy: packing and unpacking are two copies of what is sent.
    both = seconds(lambda: exchange.scatter_heads(q, k, v), sizes.device, rounds)
    copy = seconds(lambda: target.copy_(plain), sizes.device, rounds)
    return {"packing_bytes_per_second": 4 * sent / both, "copy_bytes_per_second": 2 * sent / copy}


def layer(sizes: Sizes, kernel: Kernel, ranks: int, ffn: int, rounds: int) -> tuple[float, float]:
    """Return (seconds, FLOPs) of a rank's share of a 7B-like layer, forward and backward, attention by the ring."""
    hidden, tokens = sizes.heads * sizes.dim, sizes.tokens // ranks
    widths = [(hidden, hidden + 2 * sizes.groups * sizes.dim), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)]
    made = {"dtype": sizes.dtype, "device": sizes.device}
    products_of = [(torch.randn(tokens, i, **made), torch.randn(o, i, **made)) for i, o in widths]
    attention = ring(sizes, kernel, ranks)[0]

    def run() -> None:
        for x, weight in products_of:
            out = x @ weight.T
            _ = out @ weight, out.T @ x
        attention()

    products = 6 * tokens * sum(i * o for i, o in widths)
    return seconds(run, sizes.device, rounds), products + sizes.flops / ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = _options(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    kernel = select_kernel(device, dtype, options.dim).kernel
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((flops for key, flops in PEAK.items() if key in name), None)
    print(f"{name}, {kernel.name}, {options.dtype}, {options.heads} heads of {options.dim}, {options.rounds} rounds")
    rows = []
    for groups in options.groups:
        for tokens in options.tokens:
            sizes = Sizes(tokens, options.heads, groups, options.dim, dtype, device)
            rows += _rows(sizes, kernel, options, peak)
    sizes = Sizes(options.tokens[0], options.heads, options.groups[-1], options.dim, dtype, device)
    result = {"device": name, "kernel": kernel.name, "rows": rows, **packing(sizes, options.ulysses, options.rounds)}
    print(
        f"packing {result['packing_bytes_per_second'] / 1e9:.0f} GB/s, a copy "
        f"{result['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    )
    print(json.dumps(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _rows(sizes: Sizes, kernel: Kernel, options: argparse.Namespace, peak: float | None) -> list[dict[str, Any]]:
    alone = seconds(whole(sizes, kernel), sizes.device, options.rounds)
    rows = []
    for ranks in options.ranks:
        runs = ring(sizes, kernel, ranks)
        together = sum(seconds(run, sizes.device, options.rounds) for run in runs)
        taken, flops = layer(sizes, kernel, ranks, options.ffn, options.rounds)
        row = {
            "tokens": sizes.tokens,
            "groups": sizes.groups,
            "ranks": ranks,
            "block": sizes.tokens // (2 * ranks),
            "overhead": together / alone - 1,
            "flash_seconds": alone,
            "layer_mfu": flops / taken / peak if peak else None,
        }
        rows.append(row)
        mfu = f", layer at {row['layer_mfu']:.1%} of peak" if peak else ""
        print(f"{sizes.tokens:7} tokens, {sizes.groups} groups, R {ranks}: {row['overhead']:+.1%} over one call{mfu}")
    return rows


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.emulated_ring", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 8])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--ulysses", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
