"""Run a small collective in each process group, and measure its bandwidth."""

import time
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist

from megatron.longseq.preflight.report import Finding

CPU_BYTES, GPU_BYTES = 1 << 20, 64 << 20
REPEATS = 3


def own_groups() -> list[Any]:
    """Return all process groups that this rank belongs to and that have other members, in the order of creation.

    All ranks create their groups in one order and their names count up, so that no two ranks wait for each other.
    """
    known = dist.distributed_c10d._world.pg_names
    groups = sorted(known, key=lambda group: (len(known[group]), known[group]))
    return [group for group in groups if dist.get_world_size(group) > 1]


def measure(group: Any, device: torch.device) -> dict[str, Any]:
    """All-reduce a tensor whose sum is known, and return the bus bandwidth in bytes/s.

    Args:
        group: the process group; all its ranks call this.
        device: device of the tensor.

    Returns:
        "group" (its name), "size" (ranks) and "bandwidth" (bus bandwidth of the fastest of `REPEATS` runs, bytes/s).

    Raises:
        RuntimeError: the sum is wrong.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    count = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4
    seconds = []
    for _ in range(REPEATS):
        tensor = torch.full((count,), float(rank + 1), device=device)
        _wait(device)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _wait(device)
        seconds.append(time.perf_counter() - started)
        if not bool((tensor == size * (size + 1) / 2).all()):
            raise RuntimeError(f"an all-reduce in group {_name(group)} gave a wrong sum on rank {dist.get_rank()}")
    traffic = 2 * (size - 1) / size * count * 4
    return {"group": _name(group), "size": size, "bandwidth": traffic / min(seconds)}


def _name(group: Any) -> str:
    name = str(getattr(group, "group_desc", "") or "unnamed").lower()
    return name.replace("_group", "").replace("_pg", "").replace("_", " ")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(group: Any, device: torch.device) -> torch.device:
    return device if device.type == "cuda" and "nccl" in dist.get_backend(group) else torch.device("cpu")


def check_groups(device: torch.device) -> list[Finding]:
    """Run the collective in all groups and return one finding for each name of a group, the same on all ranks."""
    own: list[Any] = []
    for group in own_groups():
        try:
            own.append(measure(group, _device(group, device)))
        except RuntimeError as error:
            own.append({"group": _name(group), "size": dist.get_world_size(group), "error": str(error)[:300]})
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    if not any(gathered):
        return [Finding("process groups", "skipped", "one rank")]
    found: dict[tuple[str, int], list[Any]] = {}
    for rank, results in enumerate(gathered):
        for one in results:
            found.setdefault((one["group"], one["size"]), []).append((rank, one))
    return [_finding(name, size, results) for (name, size), results in found.items()]


def _finding(name: str, size: int, results: list[Any]) -> Finding:
    check = f"group {name}"
    for rank, one in results:
        if "error" in one:
            return Finding(check, "FAILED", f"rank {rank}: {one['error']}")
    rank, slowest = min(results, key=lambda pair: pair[1]["bandwidth"])
    return Finding(check, "ok", f"{size} ranks, {slowest['bandwidth'] / 1e9:.3g} GB/s (slowest: rank {rank})")


def check_attention(args: Namespace, device: torch.device, is_ours: bool) -> Finding:
    """Return which attention kernel the layers use.

    Args:
        args: upstream's parsed arguments.
        device: of this rank.
        is_ours: whether the layers use this project's attention.
    """
    if not is_ours:
        what = (
            "TransformerEngine's, which chooses its kernel" if device.type == "cuda" else "upstream's local attention"
        )
        return Finding("attention", "ok", what if args.transformer_impl != "local" else "upstream's local attention")
    from megatron.longseq.attention.kernels.select import select_kernel

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    try:
        choice = select_kernel(device, dtype, args.kv_channels, backend=args.attention_backend.name)
    except ValueError as error:
        return Finding("attention", "FAILED", str(error))
    if choice.kernel.name == "reference":
        return Finding("attention", "FAILED", f"{choice.why}: it stores the whole score matrix")
    return Finding("attention", "ok", choice.why)
