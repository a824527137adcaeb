"""Log GPU memory that is reserved but not allocated, once per log interval (--log-memory-fragmentation)."""

from argparse import Namespace

GB = 1e9


def asked_for(args: Namespace) -> bool:
    """Return whether `--log-memory-fragmentation` is given."""
    return bool(getattr(args, "log_memory_fragmentation", False))


def line(iteration: int, unused: int, reserved: int, segments: int) -> str:
    """Return the line of the log.

    Args:
        iteration: number of the step.
        unused: bytes that are reserved but not allocated, on the rank that has most of them.
        reserved: bytes that are reserved, on the rank that has most.
        segments: times that a rank has allocated memory from the device since its start, the most of all ranks.
    """
    return (
        f" iteration {iteration:8d} | reserved but not allocated (GB, most of all ranks): {unused / GB:.3f} | "
        f"reserved (GB): {reserved / GB:.3f} | allocations from the device so far: {segments} |"
    )


def log_fragmentation(iteration: int) -> None:
    """Print the line on the last rank. Every rank must call this at the same time."""
    import torch
    from megatron.training import get_tensorboard_writer, print_rank_last

    reserved = torch.cuda.memory_reserved()
    segments = torch.cuda.memory_stats().get("num_device_alloc", 0)
    values = torch.tensor(
        [reserved - torch.cuda.memory_allocated(), reserved, segments], dtype=torch.int64, device="cuda"
    )
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    unused, reserved, segments = (int(value) for value in values)
    print_rank_last(line(iteration, unused, reserved, segments))
    writer = get_tensorboard_writer()
    if writer:
        writer.add_scalar("memory/reserved-not-allocated-bytes", unused, iteration)
