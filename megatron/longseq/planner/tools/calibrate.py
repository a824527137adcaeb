"""The command `calibrate`: measures this machine and writes a cluster's profile."""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.longseq.planner.plan.cluster import cluster

_RANKS_OF_A_CORE = 4  # at most, on a CPU
_ATTENTION_HALF = 384.0  # tokens at which the planner's fused attention reaches half of its efficiency


def add_calibrate_command(commands: Any) -> None:
    """Add the command to the planner's subparsers."""
    command = commands.add_parser("calibrate", help="measure this machine's GPUs, or its CPU, and write a profile")
    command.add_argument("--gpus", type=int, metavar="N", help="ranks that measure at once; default: all GPUs, or 2")
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where; default auto")
    command.add_argument("--seconds", type=float, metavar="S", help="budget of the measurements; default 60, CPU 40")
    command.add_argument("--output", type=Path, default=Path("profile.json"), metavar="FILE", help="the profile")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Measure, write the profile, and return what the command prints.

    Raises:
        ValueError: there are not as many GPUs, the budget is not positive, or the profile is a folder.
        OSError: the profile cannot be written.
    """
    import torch

    available = torch.cuda.device_count()
    device = args.device if args.device != "auto" else ("cuda" if available else "cpu")
    ranks = args.gpus if args.gpus is not None else (available if device == "cuda" else 2)
    if device == "cuda" and not available:
        raise ValueError("--device cuda: PyTorch sees no GPU; give --device cpu")
    most = available if device == "cuda" else _RANKS_OF_A_CORE * (os.cpu_count() or 1)
    if not 1 <= ranks <= most:
        raise ValueError(f"--gpus {ranks}: give 1 to {most}")
    if args.seconds is not None and args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds}: give more than 0")
    if args.output.is_dir():
        raise ValueError(f"--output {args.output}: this is a folder; name a file")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    profile = profile_of(measure_ranks(ranks, device, args.seconds), device)
    args.output.write_text(json.dumps(profile, indent=1) + "\n")
    found = cluster(str(args.output))  # the profile is read back, so that a wrong one is not left unnoticed
    links = f"{found.link_bandwidth / 1e9:.3g} GB/s and {found.link_latency * 1e6:.3g} us"
    shares = f"{100 * found.attention_efficiency:.0f} % and {100 * found.attention_backward_efficiency:.0f} %"
    return (
        f"{args.output}: {ranks} ranks, {found.peak_tflops:.3g} TFLOP/s, memory {found.memory_bandwidth / 1e9:.3g} "
        f"GB/s, links {links}, attention {shares} of the peak; give --cluster {args.output}"
    )


def measure_ranks(ranks: int, device: str, seconds: float | None) -> list[dict[str, Any]]:
    """Return the measurements of ranks that run at the same time, one process each.

    Args:
        ranks: number of processes, one per GPU.
        device: "cuda" or "cpu".
        seconds: budget of the measurements; None: the default of the device.
    """
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, device, seconds, folder), ranks, join=True, start_method="spawn")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, device: str, seconds: float | None, folder: str) -> None:
    """Measure as one of several ranks and write the result to the folder."""
    from dataclasses import replace

    import torch
    import torch.distributed as dist

    from megatron.longseq.planner.tools.measure import CPU_SIZES, GPU_SIZES, measure

    place = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
    sizes = GPU_SIZES if device == "cuda" else CPU_SIZES
    sizes = replace(sizes, seconds=seconds) if seconds else sizes
    groups = []
    for size in (one for one in range(2, ranks + 1) if ranks % one == 0):
        made = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
        groups.append((size, made[rank // size]))
    dist.barrier()
    found = measure(sizes, place, torch.bfloat16 if device == "cuda" else torch.float32, groups)
    found |= _machine(place, ranks) | {"attention_length": sizes.attention[1]}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _machine(device: Any, ranks: int) -> dict[str, Any]:
    """Return the name, the memory and the multiprocessors of a rank's device."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        return {"name": properties.name, "memory_bytes": total, "sms": properties.multi_processor_count, "free": free}
    import psutil

    return {"name": "cpu", "memory_bytes": psutil.virtual_memory().total / ranks, "sms": 1}


def profile_of(measured: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    """Return the profile of some ranks' measurements, by their means.

    Args:
        measured: measurements of every rank, see `measure_ranks`.
        device: "cuda" or "cpu".

    Raises:
        ValueError: no rank was measured.
    """
    if not measured:
        raise ValueError("no rank was measured")
    from megatron.longseq.throughput import peak_tflops

    products = [
        [*shapes[0][:3], statistics.mean(shape[3] for shape in shapes)]
        for shapes in zip(*(one["products"] for one in measured), strict=True)
    ]
    best = max(product[3] for product in products)
    peak = peak_tflops(measured[0]["name"]) or best
    length = measured[0]["attention_length"]
    rate = length / (length + _ATTENTION_HALF) * peak * 1e12
    forward, backward = (statistics.mean(one["attention"][part] for one in measured) / rate for part in (0, 1))
    bandwidth, latency = fit_link([message for one in measured for message in one["messages"]])
    on_gpu = device == "cuda"
    return {
        "gpus": len(measured),
        "gpus_per_node": len(measured),
        "peak_tflops": peak,
        "fp32_peak_tflops": statistics.mean(one.get("float32", 0.0) for one in measured) / (best / peak),
        "sms": measured[0]["sms"],
        "product_efficiency": best / peak,
        "product_depth": 196 if on_gpu else 0,
        "products": products,
        "memory_bytes": measured[0]["memory_bytes"],
        "memory_bandwidth": statistics.mean(one["memory_bandwidth"] for one in measured),
        "memory_efficiency": statistics.mean(one["memory_efficiency"] for one in measured),
        "attention_efficiency": forward,
        "attention_backward_efficiency": backward,
        "layer_seconds": statistics.mean(one["layer_seconds"] for one in measured),
        "link_bandwidth": bandwidth,
        "link_latency": latency,
        "link_efficiency": 1.0,
        "message_bytes": 1.0,
        "node_bandwidth": bandwidth,
        "unfused_rms_norm": not on_gpu,
        "context_bytes": 2.5e9 if on_gpu else 0.0,
        "workspace_bytes": 64e6 if on_gpu else 0.0,
        "deterministic_workspace_bytes": 80e6 if on_gpu else 0.0,
        "source": f"measured by calibrate on {measured[0]['name']}, one node; set node_bandwidth for several nodes",
    }


def fit_link(messages: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return bandwidth and latency of a ring's hop from all-reduces, by least squares of the relative errors.

    An all-reduce of S bytes over n ranks takes 2 (n - 1) (latency + S / n / bandwidth).

    Args:
        messages: ranks, bytes and seconds of every all-reduce; none: a single rank, whose links do not matter.

    Returns:
        Bytes per second, and seconds.
    """
    if not messages:
        return 1e12, 0.0
    rows = [(2 * (n - 1) / t, 2 * (n - 1) * size / n / t) for n, size, t in messages]
    aa, ab, bb = (sum(x * y for x, y in pairs) for pairs in _products(rows))
    ya, yb = sum(a for a, _ in rows), sum(b for _, b in rows)
    determinant = aa * bb - ab * ab
    latency, inverse = (ya * bb - yb * ab) / determinant, (yb * aa - ya * ab) / determinant
    if latency < 0:
        latency, inverse = 0.0, yb / bb
    if inverse <= 0:
        latency, inverse = ya / aa, 1e-12
    return 1.0 / inverse, latency


def _products(rows: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], ...]:
    return [(a, a) for a, _ in rows], list(rows), [(b, b) for _, b in rows]
