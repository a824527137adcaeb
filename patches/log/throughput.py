"""Log tokens per second, model TFLOP/s and the highest peak memory of all ranks, once per log interval."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

_MIB = 2**20


def asked_for(args: Namespace) -> bool:
    """Return whether upstream's `--log-throughput` is given."""
    return bool(getattr(args, "log_throughput", False))


def line(iteration: int, seconds: float, tokens: int, flops: float, ranks: int, peak_bytes: int) -> str:
    """Format the figures of one step.

    Args:
        iteration: step number.
        seconds: time per step.
        tokens: tokens per step, over all ranks.
        flops: floating-point operations of the model per step, over all ranks (upstream's formula).
        ranks: number of ranks.
        peak_bytes: peak memory of the fullest rank.
    """
    speed = tokens / seconds
    return (
        f" iteration {iteration:8d} | tokens/s: {speed:.1f} | tokens/s/rank: {speed / ranks:.1f} |"
        f" model TFLOP/s/rank: {flops / seconds / ranks / 1e12:.4g} | peak memory (MiB): {peak_bytes / _MIB:.1f} |"
    )


def with_throughput_line(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `training_log`: log our line after upstream's, at the same steps, and write its values to TensorBoard."""

    def training_log(
        loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int, *rest: Any, **named: Any
    ) -> Any:
        from megatron.training import get_args

        args = get_args()
        if iteration % args.log_interval != 0 or named.get("is_first_iteration"):
            return original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)
        seconds = _seconds_per_step(total_loss_dict)  # read before upstream's call, which resets both counters
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)
        _report(args, iteration, seconds, named)
        return result

    return training_log


def _seconds_per_step(totals: dict[str, Any]) -> float:
    from megatron.training import get_timers

    steps = (
        totals.get("advanced iterations", 0) + totals.get("skipped iterations", 0) + 1
    )  # this one is not yet counted
    return float(get_timers()("interval-time").elapsed(reset=False, barrier=False)) / steps


def _report(args: Namespace, iteration: int, seconds: float, named: dict[str, Any]) -> None:
    import torch
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size
    from megatron.training import get_tensorboard_writer, print_rank_last
    from megatron.training.training import num_floating_point_operations

    peak = torch.tensor([torch.cuda.max_memory_allocated()], dtype=torch.int64, device="cuda")
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    samples = get_current_global_batch_size()
    lengths = ("seqlen_squared_sum_in_batch", "total_real_tokens_in_batch")
    flops = num_floating_point_operations(args, samples, **{name: named.get(name) for name in lengths})
    tokens = samples * args.seq_length
    print_rank_last(line(iteration, seconds, tokens, flops, args.world_size, int(peak)))
    writer = get_tensorboard_writer()
    if writer:
        writer.add_scalar("tokens-per-second", tokens / seconds, iteration)
        writer.add_scalar("model-tflops-per-rank", flops / seconds / args.world_size / 1e12, iteration)
        writer.add_scalar("peak-memory-bytes", int(peak), iteration)
