"""Small jobs that the pool's own tests run on ranks."""

import os
import subprocess
import time

import torch
import torch.distributed as dist


def all_reduce_of_ranks() -> float:
    """Sum the rank numbers over gloo."""
    dist.init_process_group("gloo")
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value)
    return value.item()


def raise_on(rank: int) -> None:
    """Raise on one rank while the others wait for it."""
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ValueError(f"planted on rank {rank}")
    dist.barrier()


def die_on(rank: int) -> None:
    """Die without an error message on one rank."""
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), 9)


def sleep(seconds: float) -> None:
    """Hang for a while."""
    time.sleep(seconds)


def start_helper() -> int:
    """Start a process that would outlive its rank, as upstream's checkpoint writer does; return its pid."""
    return subprocess.Popen(["sleep", "600"]).pid
