"""Log tokens per second, model TFLOP/s, MFU and the highest peak memory of all ranks, once per log interval."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.longseq.throughput import Throughput, peak_tflops
from patches.engine import session
from patches.log import fragmentation

ID = "log.throughput"


def asked_for(args: Namespace) -> bool:
    """Return whether upstream's `--log-throughput` is given."""
    return bool(getattr(args, "log_throughput", False))


def logs_lines(args: Namespace) -> bool:
    """Return whether this project adds lines to the log, of throughput or of fragmentation."""
    return asked_for(args) or fragmentation.asked_for(args)


@dataclass
class Interval:
    """Sums over the steps since the last line, and what stays the same in a run.

    Attributes:
        steps: number of steps.
        tokens: tokens of the documents of all ranks.
        squares: squares of document lengths, see `patches.log.documents`.
        peak_tflops: peak of all ranks together, NaN if that of a rank is unknown; None before the first line.
    """

    steps: int = 0
    tokens: float = 0.0
    squares: float = 0.0
    peak_tflops: float | None = None

    def add(self, tokens: float, squares: float) -> None:
        """Add a step."""
        self.steps, self.tokens, self.squares = self.steps + 1, self.tokens + tokens, self.squares + squares

    def reset(self) -> None:
        """Begin a new interval."""
        self.steps, self.tokens, self.squares = 0, 0.0, 0.0


def with_throughput_line(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `training_log`: log our lines after upstream's, at the same steps, and write their values to TensorBoard."""

    def training_log(
        loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int, *rest: Any, **named: Any
    ) -> Any:
        from megatron.training import get_args

        args = get_args()
        interval: Interval = session.SESSION.state.setdefault(ID, Interval())
        interval.add(*_sums_of_step(args, named))
        if iteration % args.log_interval != 0 or named.get("is_first_iteration"):
            return original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)
        seconds = _seconds_per_step(total_loss_dict)  # read before upstream's call, which resets both counters
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)
        if asked_for(args):
            _report(args, iteration, seconds, interval)
        if fragmentation.asked_for(args):
            fragmentation.log_fragmentation(iteration)
        interval.reset()
        return result

    return training_log


def _sums_of_step(args: Namespace, named: dict[str, Any]) -> tuple[float, float]:
    """Return tokens and squares of a step; where upstream has none, those of whole sequences."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    tokens, squares = (named.get(name) for name in ("total_real_tokens_in_batch", "seqlen_squared_sum_in_batch"))
    whole = get_current_global_batch_size() * args.seq_length
    return whole if tokens is None else tokens, whole * args.seq_length if squares is None else squares


def _seconds_per_step(totals: dict[str, Any]) -> float:
    from megatron.training import get_timers

    steps = (
        totals.get("advanced iterations", 0) + totals.get("skipped iterations", 0) + 1
    )  # this one is not yet counted
    return float(get_timers()("interval-time").elapsed(reset=False, barrier=False)) / steps


def _report(args: Namespace, iteration: int, seconds: float, interval: Interval) -> None:
    import torch
    from megatron.training import get_tensorboard_writer, print_rank_last
    from megatron.training.training import num_floating_point_operations

    peak = torch.cuda.max_memory_allocated()
    unused = torch.cuda.max_memory_reserved() - peak
    memory = torch.tensor([peak, unused], dtype=torch.int64, device="cuda")
    torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MAX)
    if interval.peak_tflops is None:
        interval.peak_tflops = _peak_of_all_ranks(args)
    is_known = interval.peak_tflops == interval.peak_tflops  # not NaN
    tokens, squares = interval.tokens / interval.steps, interval.squares / interval.steps
    flops, without_attention = (num_floating_point_operations(args, 0, part, tokens) for part in (squares, 0))
    figures = Throughput(
        seconds=seconds,
        tokens=tokens,
        flops=flops,
        attention_flops=flops - without_attention,
        ranks=args.world_size,
        peak_bytes=int(memory[0]),
        unused_bytes=int(memory[1]),
        peak_tflops=interval.peak_tflops if is_known else None,
    )
    print_rank_last(figures.line(iteration))
    writer = get_tensorboard_writer()
    for name, value in figures.scalars().items() if writer else ():
        writer.add_scalar(name, value, iteration)


def _peak_of_all_ranks(args: Namespace) -> float:
    """Return the sum of all ranks' peaks in TFLOP/s, NaN if one is unknown, which is said once. All ranks call this."""
    import torch
    from megatron.training import print_rank_last

    name = torch.cuda.get_device_name()
    given = getattr(args, "peak_tflops_per_gpu", None)  # a script may make its own namespace
    own = peak_tflops(name) if given is None else given
    total = torch.tensor([float("nan") if own is None else own], dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(total)
    if torch.isnan(total).item():
        print_rank_last(
            f"> --log-throughput: the peak TFLOP/s of a rank's device is unknown (on this rank: {name}), so the MFU is "
            "not logged; give it with --peak-tflops-per-gpu"
        )
    return float(total)
