"""Checks of upstream's validated arguments: every step has a schedule, and every stage can run it."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron.longseq.pipeline.plan.from_args import stage_layers

Entry = tuple[int, int]  # number of consumed samples from which a global batch size applies, and the size


class Batch(NamedTuple):
    """The size of some steps of a run.

    Attributes:
        name: the flag and the batch size.
        microbatches: micro-batches per step.
        forward_only: whether these are evaluation steps.
        is_certain: whether the run has such steps. A run that resumes may be past the first sizes of a schedule.
    """

    name: str
    microbatches: int
    forward_only: bool = False
    is_certain: bool = True


def batches(args: Namespace) -> list[Batch]:
    """Return all sizes of training and evaluation steps.

    Raises:
        ValueError: upstream would refuse a size when it is reached.
    """
    return [*_training(args), *_evaluation(args)]


def prove_batches(args: Namespace, plan: Any) -> list[str]:
    """Validate the schedules of all steps of the run.

    Args:
        args: upstream's validated arguments.
        plan: the `PipelinePlan`.

    Returns:
        A warning for each size without a schedule that the run may have.

    Raises:
        ValueError: the run has a size without a schedule; names it.
    """
    warnings = []
    for batch in batches(args):
        try:
            plan.schedule(batch.microbatches, batch.forward_only)
        except ValueError as error:
            message = f"{batch.name}, {batch.microbatches} micro-batches: {error}"
            if batch.is_certain:
                raise ValueError(message) from error
            warnings.append(f"{message}. Training stops if it resumes before or at this batch size.")
    return warnings


def _training(args: Namespace) -> Iterator[Batch]:
    if args.skip_train:
        return
    per_round = args.micro_batch_size * args.data_parallel_size
    if args.step_batch_size_schedule is None:  # upstream ignores --rampup-batch-size
        yield Batch(f"--global-batch-size {args.global_batch_size}", args.global_batch_size // per_round)
        return
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    text = args.step_batch_size_schedule
    resumes, end = _resumes(args), {"steps": args.train_iters, "samples": args.train_samples}
    try:
        entries = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(text, args.seq_length)
        usable = [entry for entry in entries if not resumes or entry[1] % per_round == 0]
        sizes = reached_sizes(usable, per_round, **end)
    except ValueError as error:
        raise ValueError(f"--step-batch-size-schedule {text}: {error}.") from error
    for size in sizes:
        name = f"--step-batch-size-schedule {text}, batch size {size}"
        yield Batch(name, size // per_round, is_certain=not resumes or size == sizes[-1])


def _evaluation(args: Namespace) -> Iterator[Batch]:
    if args.eval_iters or args.full_validation:
        per_round = args.eval_micro_batch_size * args.data_parallel_size
        size = args.eval_global_batch_size
        yield Batch(f"--eval-global-batch-size {size}", size // per_round, forward_only=True)


def _resumes(args: Namespace) -> bool:
    """Return whether the run continues after the samples of a checkpoint."""
    if args.load is None or args.finetune:
        return False
    from megatron.longseq.checkpoints.latest import has_checkpoint  # imports torch

    return has_checkpoint(Path(args.load))


def reached_sizes(
    entries: Sequence[Entry], samples_per_round: int, *, steps: int | None = None, samples: int | None = None
) -> list[int]:
    """Return the batch sizes that a run reaches, in order, if they follow upstream's --step-batch-size-schedule.

    Args:
        entries: the schedule, by rising threshold; the first threshold is 0.
        samples_per_round: samples of one micro-batch on all data-parallel ranks.
        steps: steps of the run; None: as many as `samples` need.
        samples: samples of the run; None: as many as `steps` take. With neither the run does not end.

    Raises:
        ValueError: there is no entry, or a batch size is not a whole number of micro-batches or below the one before.
    """
    if not entries:
        raise ValueError(f"no batch size is a multiple of {samples_per_round}, the samples of one micro-batch")
    sizes: list[int] = []
    consumed = passed = 0
    ends = [threshold for threshold, _ in entries[1:]]
    for (_, size), end in zip(entries, [*ends, None], strict=True):
        if end is not None and consumed >= end:
            continue
        if (steps is not None and passed >= steps) or (samples is not None and consumed >= samples):
            break
        if size < 1 or size % samples_per_round:
            raise ValueError(
                f"batch size {size} is not a multiple of {samples_per_round}, the samples of one micro-batch on all "
                "data-parallel ranks"
            )
        if sizes and size < sizes[-1]:
            raise ValueError(f"batch size {size} follows {sizes[-1]}, but upstream cannot reduce the batch size")
        sizes += [size] if size not in sizes else []
        if end is None:
            break
        more = -(-(end - consumed) // size)
        consumed, passed = consumed + more * size, passed + more
    return sizes


def refuse_stages(args: Namespace) -> None:
    """Refuse stages that our schedules cannot run.

    Raises:
        ValueError: names the stage, the flag and what to do.
    """
    predicts, layers = _predicts(args), _layers(args)
    if any(predicts[:-1]):
        raise ValueError(
            f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout}: our pipeline schedules do not "
            f"support multi-token prediction in stage {predicts.index(True)}, because upstream's messages then have "
            "different sizes. Put it into the last stage."
        )
    empty = [stage for stage, count in enumerate(layers[:-1]) if count < 1]
    if args.zero_bubble and empty:
        raise ValueError(
            f"--zero-bubble: pipeline stage {empty[0]} of {len(layers)} has no transformer layer, so it has no "
            f"weight gradients to delay (layers per stage: {layers}). Give each stage except the last a layer, with "
            "--num-layers, --decoder-first-pipeline-num-layers, --pipeline-model-parallel-layout or --account-for-..."
        )


def _layers(args: Namespace) -> list[int]:
    """Return the transformer layers of each pipeline rank, of all its virtual stages."""
    layout = _layout(args)
    if layout is None:
        return stage_layers(args)
    return [sum(stage.count("decoder") for stage in rank) for rank in layout]


def _predicts(args: Namespace) -> list[bool]:
    """Return whether each pipeline rank has layers of multi-token prediction."""
    return [any("mtp" in stage for stage in rank) for rank in _layout(args) or []]


def _layout(args: Namespace) -> list[list[list[str]]] | None:
    """Return the names of the layers of each pipeline rank and virtual stage; None without a layout."""
    text = args.pipeline_model_parallel_layout
    if text is None:
        return None
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = PipelineParallelLayerLayout(text, args.pipeline_model_parallel_size)
    return [[[layer.name for layer in stage] for stage in rank] for rank in layout.layout]
