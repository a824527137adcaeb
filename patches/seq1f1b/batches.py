"""The numbers of micro-batches that a run's steps and evaluations have, and the proof that each has a schedule."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron.longseq.pipeline.plan.batch_sizes import reached_sizes


class Batch(NamedTuple):
    """One size of a step.

    Attributes:
        name: the flag and the size that it stands for.
        microbatches: per step.
        forward_only: evaluation.
        is_certain: whether the run has such a step: after a checkpoint that is loaded, earlier sizes may be past.
    """

    name: str
    microbatches: int
    forward_only: bool = False
    is_certain: bool = True


def batches(args: Namespace) -> list[Batch]:
    """Return every size of a training step and of an evaluation, from upstream's validated arguments.

    Raises:
        ValueError: upstream would refuse a size when it comes.
    """
    return [*_training(args), *_evaluation(args)]


def prove_batches(args: Namespace, plan: Any) -> list[str]:
    """Prove the schedule of every step that the run has; return warnings for those that it may have.

    Args:
        args: upstream's validated arguments.
        plan: `pipeline.plan.Plan`.

    Raises:
        ValueError: a size without a schedule; names it.
    """
    warnings = []
    for batch in batches(args):
        try:
            plan.schedule(batch.microbatches, batch.forward_only)
            if plan.one_queue:
                plan.receives(batch.microbatches, batch.forward_only)
        except ValueError as error:
            message = f"{batch.name}, {batch.microbatches} micro-batches: {error}"
            if batch.is_certain:
                raise ValueError(message) from error
            warnings.append(f"{message}. Training stops if it resumes before the batch size is past.")
    return warnings


def _training(args: Namespace) -> Iterator[Batch]:
    if args.skip_train:
        return
    per_round = args.micro_batch_size * args.data_parallel_size
    if args.step_batch_size_schedule is None:  # upstream ignores --rampup-batch-size
        yield Batch(f"--global-batch-size {args.global_batch_size}", args.global_batch_size // per_round)
        return
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    given = args.step_batch_size_schedule
    entries = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(given, args.seq_length)
    resumes, end = _resumes(args), {"steps": args.train_iters, "samples": args.train_samples}
    try:
        usable = [entry for entry in entries if not resumes or entry[1] % per_round == 0]
        sizes = reached_sizes(usable, per_round, **end)
    except ValueError as error:
        raise ValueError(f"--step-batch-size-schedule {given}: {error}.") from error
    for size in sizes:
        name = f"--step-batch-size-schedule {given}, batch size {size}"
        yield Batch(name, size // per_round, is_certain=not resumes or size == sizes[-1])


def _evaluation(args: Namespace) -> Iterator[Batch]:
    if args.eval_iters or args.full_validation:
        per_round = args.eval_micro_batch_size * args.data_parallel_size
        size = args.eval_global_batch_size
        yield Batch(f"--eval-global-batch-size {size}", size // per_round, forward_only=True)


def _resumes(args: Namespace) -> bool:
    """Whether the run begins after a checkpoint's samples."""
    if args.load is None or args.finetune:
        return False
    return (Path(args.load) / "latest_checkpointed_iteration.txt").exists()
