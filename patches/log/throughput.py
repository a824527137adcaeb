"""Log tokens per second, model TFLOP/s, MFU and the highest peak memory of all ranks, once per log interval.

--log-throughput adds a line of these figures to upstream's. --start-folder puts them into the record of the step,
beside loss, norm and learning rate (`patches.log.steps`).
"""

import inspect
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.longseq.throughput import Throughput, peak_tflops
from patches.engine import session
from patches.log import fragmentation, steps
from patches.log.gather import RankFigures, gather

ID = "log.throughput"


def asked_for(args: Namespace) -> bool:
    """Return whether upstream's `--log-throughput` is given."""
    return bool(getattr(args, "log_throughput", False))


def logs_lines(args: Namespace) -> bool:
    """Return whether this project adds lines to the log: of throughput, of fragmentation, or of whole steps."""
    return asked_for(args) or fragmentation.asked_for(args) or steps.asked_for(args)


@dataclass
class Interval:
    """Sums over the steps since the last line.

    Attributes:
        steps: number of steps.
        tokens: tokens of the documents of all ranks.
        squares: squares of document lengths, see `patches.log.documents`.
    """

    steps: int = 0
    tokens: float = 0.0
    squares: float = 0.0

    def add(self, tokens: float, squares: float) -> None:
        """Add a step.

        Args:
            tokens: tokens of the documents of all ranks in the step.
            squares: sum of the squares of their lengths, see `patches.log.documents`.
        """
        self.steps, self.tokens, self.squares = self.steps + 1, self.tokens + tokens, self.squares + squares

    def reset(self) -> None:
        """Begin a new interval."""
        self.steps, self.tokens, self.squares = 0, 0.0, 0.0


@dataclass
class LogState:
    """What the log of this process keeps from step to step.

    Attributes:
        of_line: steps since the last line of --log-throughput.
        of_step: steps since the last record of --start-folder.
        log: the record.
        peak_tflops: peak of all ranks together, NaN if that of a rank is unknown; None before the first line.
    """

    of_line: Interval = field(default_factory=Interval)
    of_step: Interval = field(default_factory=Interval)
    log: steps.StepLog = field(default_factory=steps.StepLog)
    peak_tflops: float | None = None


def with_our_lines(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `training_log`: log our lines after upstream's, and write their values to TensorBoard and to the record.

    Upstream also logs the first step of a start, whatever the log interval, and does not begin a new interval there.
    The record does, so that its second line is not a mean with the first step, which is slow.
    """
    signature = inspect.signature(original)

    def training_log(*positional: Any, **named: Any) -> Any:
        from megatron.training import get_args

        args = get_args()
        call = signature.bind(*positional, **named).arguments
        state = session.SESSION.state.setdefault(ID, LogState())
        sums = _sums_of_step(args, call)
        state.of_line.add(*sums)
        state.of_step.add(*sums)
        if steps.asked_for(args):
            steps.begin(args, state.log, call["iteration"] - 1)
            state.log.add(call["loss_dict"], int(call["skipped_iter"]))
        is_first, iteration = bool(call.get("is_first_iteration")), call["iteration"]
        is_line, is_step = iteration % args.log_interval == 0 and not is_first, steps.asked_for(args)
        if not (is_line or (is_first and is_step)):
            return original(*positional, **named)
        elapsed = _elapsed()  # read before upstream's call, which resets its timer
        result = original(*positional, **named)
        _report(args, state, call, elapsed, is_line)
        state.of_step.reset()
        state.log.elapsed = elapsed if is_first else 0.0
        if is_line:
            state.of_line.reset()
        return result

    return training_log


def _sums_of_step(args: Namespace, call: dict[str, Any]) -> tuple[float, float]:
    """Return tokens and squares of a step; where upstream has none, those of whole sequences."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    tokens, squares = (call.get(name) for name in ("total_real_tokens_in_batch", "seqlen_squared_sum_in_batch"))
    whole = get_current_global_batch_size() * args.seq_length
    return whole if tokens is None else tokens, whole * args.seq_length if squares is None else squares


def _elapsed() -> float:
    """Return the seconds of upstream's timer since its last line, without evaluation and saving."""
    from megatron.training import get_timers

    return float(get_timers()("interval-time").elapsed(reset=False, barrier=False))


def _report(args: Namespace, state: LogState, call: dict[str, Any], elapsed: float, is_line: bool) -> None:
    """Log what the flags ask for. Every rank calls this at the same time.

    Args:
        args: upstream's arguments.
        state: of this process.
        call: arguments of `training_log` by name.
        elapsed: seconds of upstream's timer.
        is_line: whether upstream's log interval ends here.
    """
    is_step = steps.asked_for(args)
    if is_step or asked_for(args):
        bubble = steps.bubble_of_pipeline(args, state.log, call["iteration"]) if is_step else math.nan
        ranks = gather(call["learning_rate"], bubble)
        if state.peak_tflops is None:
            state.peak_tflops = _peak_of_all_ranks(args)
        if is_step:
            figures = _figures(args, state.of_step, elapsed - state.log.elapsed, ranks, state.peak_tflops)
            steps.write_step(args, state.log, call, figures, ranks, state.of_step.steps)
        if is_line and asked_for(args):
            _print_throughput(call, _figures(args, state.of_line, elapsed, ranks, state.peak_tflops))
    if is_line and fragmentation.asked_for(args):
        fragmentation.log_fragmentation(call["iteration"])


def _print_throughput(call: dict[str, Any], figures: Throughput) -> None:
    from megatron.training import get_tensorboard_writer, print_rank_last

    print_rank_last(figures.line(call["iteration"]))
    writer = get_tensorboard_writer()
    for name, value in figures.scalars().items() if writer else ():
        writer.add_scalar(name, value, call["iteration"])


def _figures(args: Namespace, interval: Interval, seconds: float, ranks: RankFigures, peak: float) -> Throughput:
    """Return the figures of an interval that took `seconds`."""
    from megatron.training.training import num_floating_point_operations

    tokens, squares = interval.tokens / interval.steps, interval.squares / interval.steps
    flops, without_attention = (num_floating_point_operations(args, 0, part, tokens) for part in (squares, 0))
    return Throughput(
        seconds=seconds / interval.steps,
        tokens=tokens,
        flops=flops,
        attention_flops=flops - without_attention,
        ranks=args.world_size,
        peak_bytes=int(max(ranks.peaks)),
        unused_bytes=ranks.unused_bytes,
        peak_tflops=None if math.isnan(peak) else peak,
    )


def _peak_of_all_ranks(args: Namespace) -> float:
    """Return the sum of all ranks' peaks in TFLOP/s, NaN if one is unknown, which is said once. All ranks call this."""
    import torch
    from megatron.training import print_rank_last

    name = torch.cuda.get_device_name()
    peak = getattr(args, "peak_tflops_per_gpu", None)  # a script may make its own namespace
    own = peak_tflops(name) if peak is None else peak
    total = torch.tensor([math.nan if own is None else own], dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(total)
    if torch.isnan(total).item() and asked_for(args):
        print_rank_last(
            f"> --log-throughput: the peak TFLOP/s of a rank's device is unknown (on this rank: {name}), so the MFU is "
            "not logged; give it with --peak-tflops-per-gpu"
        )
    return float(total)
