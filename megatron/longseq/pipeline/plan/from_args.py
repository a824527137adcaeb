"""Derive the segment lengths and the schedules of all steps from the flags."""

import functools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.longseq.attention.plan.layout import length_multiple
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.pipeline.plan import generators, partition
from megatron.longseq.pipeline.plan.document_partition import DocumentCut, cut_by_documents
from megatron.longseq.pipeline.plan.receives import (
    AHEAD,
    ReceiveOrder,
    is_deadlock_free_on_one_queue,
    plan_receives,
    plan_synchronized_receives,
)
from megatron.longseq.pipeline.plan.schedule import Pipeline, Schedule
from megatron.longseq.pipeline.plan.segment_cost import (
    CostModel,
    ModelShape,
    fit,
    flops,
    read_samples,
    seconds,
    segment_costs,
)
from megatron.longseq.pipeline.plan.simulate import Costs
from megatron.longseq.pipeline.plan.validate import prove

BY_DOCUMENTS = "documents"  # of --seq1f1b-partition
SYNCHRONIZING_LEVEL = 2  # --timing-log-level from which upstream's timers synchronize the device in every action


@dataclass(frozen=True)
class PipelinePlan:
    """How steps run. It follows from the flags alone, so it is the same on every rank.

    Attributes:
        stages, virtual: see `Pipeline`.
        lengths: tokens per segment, unless a micro-batch is cut by its documents.
        slack, zero_bubble, group, costs: see `generators.make`.
        one_queue: whether all streams of a GPU share a queue (CUDA_DEVICE_MAX_CONNECTIONS=1).
        synchronizes: whether every rank waits for its whole device in every action (--timing-log-level 2).
    """

    stages: int
    virtual: int
    lengths: tuple[int, ...]
    slack: int = 0
    zero_bubble: bool = False
    group: int | None = None
    costs: Costs | None = field(default=None, repr=False)
    one_queue: bool = False
    synchronizes: bool = False

    @functools.lru_cache(maxsize=64)  # noqa: B019  # plans live as long as the process
    def schedule(self, microbatches: int, forward_only: bool = False) -> Schedule:
        """Return the validated schedule of a step.

        Args:
            microbatches: micro-batches of the step.
            forward_only: whether the step is one of evaluation.

        Raises:
            ValueError: there is no schedule for this number of micro-batches; the message says which numbers have one.
        """
        pipeline = Pipeline(self.stages, microbatches, len(self.lengths), self.virtual)
        if forward_only:
            schedule = generators.forward_only(pipeline, self.group)
        else:
            schedule = generators.make(
                pipeline, slack=self.slack, zero_bubble=self.zero_bubble, group=self.group, costs=self.costs
            )
        prove(schedule)
        return schedule

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def receives(
        self, microbatches: int, forward_only: bool = False, *, synchronized: bool = False
    ) -> tuple[ReceiveOrder, ...]:
        """Return the receive order of every rank in such a step.

        Args:
            microbatches, forward_only: see `schedule`.
            synchronized: whether to return `plan_synchronized_receives` in any case.

        Raises:
            ValueError: the ranks would deadlock on one queue.
        """
        schedule = self.schedule(microbatches, forward_only)
        if self.synchronizes or synchronized:
            return plan_synchronized_receives(schedule)  # on one queue, too: it waits for less than the whole device
        if not self.one_queue:
            return plan_receives(schedule)
        for ahead in range(1, AHEAD + 1):  # on one queue, a receive behind another one delays compute
            receives = plan_receives(schedule, ahead)
            if is_deadlock_free_on_one_queue(schedule, receives):
                return receives
        raise ValueError(
            "with CUDA_DEVICE_MAX_CONNECTIONS=1, a GPU starts work in the order of submission, and in that order the "
            f"ranks of {schedule.name} ({schedule.pipeline}) would deadlock on each other's messages. Give fewer "
            "segments or virtual stages, or less --seq1f1b-slack; or unset the variable where upstream allows it "
            "(without tensor and context parallelism, or on Blackwell and later GPUs)."
        )


def plan_from_args(args: Namespace, *, one_queue: bool = False) -> PipelinePlan:
    """Return the plan for upstream's validated arguments.

    Args:
        args: the arguments.
        one_queue: whether all streams of a GPU share a queue.

    Raises:
        ValueError: the partition does not fit the sequence.
    """
    stages, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    lengths = segment_lengths(args)
    return PipelinePlan(
        stages=stages,
        virtual=virtual,
        lengths=lengths,
        slack=args.seq1f1b_slack,
        zero_bubble=args.zero_bubble,
        group=args.microbatch_group_size_per_vp_stage if virtual > 1 else None,
        costs=_costs(args, lengths) if args.zero_bubble else None,
        one_queue=one_queue,
        synchronizes=(getattr(args, "timing_log_level", 0) or 0) >= SYNCHRONIZING_LEVEL,
    )


def _costs(args: Namespace, lengths: tuple[int, ...]) -> Costs | None:
    """Return the costs of every stage's segments; None if a layout names the layers of each stage."""
    if args.pipeline_model_parallel_layout is not None:
        return None
    layers = stage_layers(args)
    return segment_costs(cost_model(args), lengths, len(layers), layers=layers)


def stage_layers(args: Namespace) -> list[int]:
    """Return the layers of every pipeline rank as upstream assigns them, without virtual stages and layouts."""
    stages = args.pipeline_model_parallel_size
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    embedding, loss = int(args.account_for_embedding_in_pipeline_split), int(args.account_for_loss_in_pipeline_split)
    if first is None and last is None:
        layers = [(args.num_layers + embedding + loss) // stages] * stages
        layers[0] -= embedding
        layers[-1] -= loss
        return layers
    ends = (first is not None) + (last is not None)
    middle = [(args.num_layers - (first or 0) - (last or 0)) // max(stages - ends, 1)] * (stages - ends)
    return [*([] if first is None else [first]), *middle, *([] if last is None else [last])]


def segment_lengths(args: Namespace) -> tuple[int, ...]:
    """Return the tokens of each segment, from `--seq1f1b-splits` and `--seq1f1b-partition`.

    With `--seq1f1b-partition documents` these are the segments of a sequence without documents.

    Lengths are computed once and kept, so this may be called for every micro-batch.

    Raises:
        ValueError: the partition does not fit the sequence.
    """
    if args.seq1f1b_splits == 1:
        return (args.seq_length,)
    # Micro-batches that are not cut by their documents are balanced as sequences without documents are.
    text = "balanced" if args.seq1f1b_partition == BY_DOCUMENTS else args.seq1f1b_partition
    # The padded vocabulary is unknown until the tokenizer exists. Lengths that depended on it would change after they
    # were checked and printed.
    shape = replace(model_shape(args), padded_vocab_size=args.vocab_size or 0)
    return _lengths(text, args.seq1f1b_splits, _multiple(args), shape, args.seq1f1b_layer_seconds)


def document_cutter(args: Namespace) -> Callable[[Documents], DocumentCut]:
    """Return a function from the documents of a micro-batch to its segments (`--seq1f1b-partition documents`)."""
    return functools.partial(cut_by_documents, cost_model(args), segment_lengths(args), multiple=_multiple(args))


def _multiple(args: Namespace) -> int:
    """Return the number that the tokens of a segment must be a multiple of."""
    return length_multiple(args.context_parallel_size, args.tensor_model_parallel_size if args.sequence_parallel else 1)


@functools.lru_cache(maxsize=8)
def _lengths(text: str, segments: int, multiple: int, shape: ModelShape, file: str | None) -> tuple[int, ...]:
    return partition.parse(text, _cost_model(shape, file), segments, multiple=multiple).lengths


def cost_model(args: Namespace) -> CostModel:
    """Return the costs of a layer: measured if `--seq1f1b-layer-seconds` names a file, else in FLOPs."""
    return _cost_model(model_shape(args), args.seq1f1b_layer_seconds)


@functools.lru_cache(maxsize=8)
def _cost_model(shape: ModelShape, file: str | None) -> CostModel:
    return flops(shape) if file is None else seconds(shape, fit(read_samples(Path(file)), shape.window))


def model_shape(args: Namespace) -> ModelShape:
    """Return the model's shape from upstream's validated arguments."""
    window, skip = args.window_size, args.window_attn_skip_freq
    layers = range(1, args.num_layers + 1)
    has_window = window is not None and window[0] >= 0
    windowed = tuple(_has_window(skip, layer) for layer in layers) if has_window and skip is not None else ()
    return ModelShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        seq_length=args.seq_length,
        padded_vocab_size=getattr(args, "padded_vocab_size", None) or args.vocab_size or 0,
        ffn_hidden_size=(args.moe_ffn_hidden_size if args.num_experts else None) or args.ffn_hidden_size,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        swiglu=args.swiglu,
        moe_router_topk=args.moe_router_topk if args.num_experts else 1,
        window=window[0] if has_window else None,
        windowed=windowed,
    )


def _has_window(skip: int | list[int], layer: int) -> bool:
    """Return whether a layer, counted from 1, has the window, as upstream reads --window-attn-skip-freq."""
    return layer % skip != 0 if isinstance(skip, int) else bool(skip[layer - 1])
