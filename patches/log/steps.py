"""Write the record of each logged step to the folder of this start, and print it as one line (--start-folder)."""

import functools
import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.longseq.runlog import record
from megatron.longseq.throughput import Throughput
from patches.engine import session
from patches.log.gather import RankFigures, table_of

TIMELINES = 2
GROWN = 1.01


def asked_for(args: Namespace) -> bool:
    """Return whether `--start-folder` is given, by the flag or by scripts/launch.sh."""
    return bool(getattr(args, "start_folder", None))


@dataclass
class StepLog:
    """What this process keeps from one record to the next.

    Attributes:
        counted: steps since the last record that were not skipped.
        losses: sum of each loss over these steps.
        skipped: steps since the last record that were skipped.
        elapsed: seconds that upstream's timer showed at the last record, if upstream has not reset it since.
        peaks: peak memory of each rank in the last record of memory.
        timelines: measured steps that are written.
        is_open: whether the first record is written.
        is_broken: whether a write has failed.
    """

    counted: int = 0
    losses: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    elapsed: float = 0.0
    peaks: list[float] = field(default_factory=list)
    timelines: int = 0
    is_open: bool = False
    is_broken: bool = False

    def add(self, losses: dict[str, Any], skipped: int) -> None:
        """Add a step. The losses stay on the device.

        Args:
            losses: scalar tensor of every loss, by name.
            skipped: 1 if the optimizer's step was skipped, else 0.
        """
        self.skipped += skipped
        if skipped:
            return
        self.counted += 1
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def take_losses(self) -> dict[str, float]:
        """Return the mean of each loss, and forget the steps."""
        means = {name: float(value) / self.counted for name, value in self.losses.items()}
        self.counted, self.losses = 0, {}
        return means

    def write(self, folder: Path, values: dict[str, Any]) -> None:
        """Append a record. A training goes on if the file cannot be written; this is said once.

        Args:
            folder: folder of this start of the run.
            values: fields of the record.
        """
        if self.is_broken:
            return
        file = folder / record.FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with file.open("a") as stream:
                stream.write(record.to_json(values) + "\n")
        except OSError as error:
            self.is_broken = True
            print(f"> WARNING: {file}: {error.strerror}; later steps are logged without it", flush=True)


def begin(args: Namespace, log: StepLog, first: int) -> None:
    """Write the first record, on the last rank, if it is not written yet.

    This comes before upstream's first line, because the console shows that line only where there is no record.

    Args:
        args: upstream's arguments.
        log: of this process.
        first: the step after which this start begins.
    """
    if not log.is_open and args.rank == args.world_size - 1:
        log.write(Path(args.start_folder), _start(args, first))
    log.is_open = True


def write_step(
    args: Namespace, log: StepLog, call: dict[str, Any], figures: Throughput, ranks: RankFigures, steps: int
) -> None:
    """Write the record of a step and print its line, both on the last rank.

    Args:
        args: upstream's arguments.
        log: of this process.
        call: arguments of upstream's `training_log` by name.
        figures: throughput and memory since the last record.
        ranks: what all ranks have said about this step.
        steps: steps since the last record.
    """
    from megatron.training import print_rank_last

    losses, skipped = log.take_losses(), log.skipped
    log.skipped = 0
    if args.rank != args.world_size - 1:
        return
    folder = Path(args.start_folder)
    values = record.record(
        record.STEP,
        iteration=call["iteration"],
        iterations=args.train_iters,
        steps=steps,
        samples=args.consumed_train_samples,
        losses=losses,
        grad_norm=_plain(call.get("grad_norm")),
        learning_rate=ranks.learning_rate,
        loss_scale=_plain(call.get("loss_scale")),
        params_norm=_plain(call.get("params_norm")),
        zeros=_plain(call.get("num_zeros_in_grad")),
        skipped=skipped,
        seconds=figures.seconds,
        tokens=figures.tokens,
        tokens_per_second_per_gpu=figures.tokens_per_second / figures.ranks,
        tflops_per_gpu=figures.tflops_per_rank,
        mfu=figures.mfu_causal,
        mfu_full=figures.mfu_full,
        memory_bytes=figures.peak_bytes,
        reserved_beyond_bytes=figures.unused_bytes,
        bubble=ranks.bubble,
    )
    log.write(folder, values)
    print_rank_last(record.step_line(values))
    before = log.peaks or [0.0] * len(ranks.peaks)
    if any(now > GROWN * then for now, then in zip(ranks.peaks, before, strict=True)):
        log.peaks = ranks.peaks
        peaks = [int(peak) for peak in ranks.peaks]
        log.write(folder, record.record(record.MEMORY, iteration=call["iteration"], peak_bytes=peaks))


def _start(args: Namespace, first: int) -> dict[str, Any]:
    import torch

    layout = {
        "data": args.data_parallel_size,
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
        "expert": args.expert_model_parallel_size,
    }
    return record.record(
        record.RUN,
        world_size=args.world_size,
        layout=layout,
        first_iteration=first,
        log_interval=args.log_interval,
        device=torch.cuda.get_device_name(),
    )


def _plain(value: Any) -> float | None:
    """Return a number of upstream's log, which may be a tensor."""
    return None if value is None else float(value)


def is_logged(args: Namespace, steps: int) -> bool:
    """Return whether the coming training step will be logged.

    Args:
        args: upstream's arguments; `curr_iteration` counts the steps that are done. A loop of a script may not have it.
        steps: training steps of this process, with the coming one.
    """
    return steps == 1 or (getattr(args, "curr_iteration", steps - 1) + 1) % args.log_interval == 0


def times_of(args: Namespace) -> Any:
    """Return what tells our pipeline schedules which steps to measure, or None if no step is recorded."""
    return functools.partial(is_logged, args) if asked_for(args) else None


def bubble_of_pipeline(args: Namespace, log: StepLog, iteration: int) -> float:
    """Return the measured bubble of this rank's pipeline in the last step, NaN if it was not measured.

    All ranks of a pipeline call this. The step's actions are also written to `timeline/step-NNNNNNNN/`: those of the
    first logged step, which also starts libraries and allocators, and those of the next one.

    Args:
        args: upstream's arguments.
        log: the log of this process.
        iteration: number of the step, which names the folder of its timeline.

    Returns:
        Share of the pipeline's time in which its ranks are idle, 0 to 1.
    """
    from megatron.core import mpu

    from megatron.longseq.pipeline.plan.simulate import bubble_share

    schedule = session.SESSION.state.get("seq1f1b.schedule")
    measured = None if schedule is None else schedule.take_measured()
    if measured is None or args.pipeline_model_parallel_size == 1:
        return math.nan
    _, _, spans = measured
    if log.timelines < TIMELINES:
        log.timelines += 1
        _write_timeline(Path(args.start_folder) / "timeline" / f"step-{iteration:08d}", measured)
    own = [min(span.start for span in spans), max(span.end for span in spans), sum(s.end - s.start for s in spans)]
    starts, ends, busy = table_of(own, mpu.get_pipeline_model_parallel_group())
    return bubble_share(sum(busy), len(busy), max(ends) - min(starts))


def _write_timeline(folder: Path, measured: Any) -> None:
    from patches.seq1f1b.schedule import write_trace

    try:
        write_trace(folder, *measured)
    except OSError as error:
        print(f"> WARNING: {folder}: {error.strerror}; the timeline of this step is not kept", flush=True)
