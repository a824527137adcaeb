"""Put our pipeline schedules in the place of upstream's forward-backward function."""

import functools
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron.longseq.pipeline.arguments import check_trace_step, refuse_unserved
from megatron.longseq.pipeline.plan.from_args import BY_DOCUMENTS
from patches.engine import session
from patches.environment import has_one_queue
from patches.log.steps import times_of
from patches.seq1f1b.checks import prove_batches, refuse_stages


def with_plan(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: refuse what our schedules do not support, and validate the schedules of the run.

    Raises:
        ValueError: flags cannot be combined, the partition does not fit, or a number of micro-batches has no schedule.
    """

    def validate_args(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        result = original(args, defaults or {})
        refuse_unserved(args)
        refuse_stages(args)
        check_trace_step(args)
        _refuse_partition(args)
        if args.seq1f1b_splits > 1:
            # In TransformerEngine's layers the backward of a micro-batch's first forward overwrites fused weight
            # gradients. With segments that backward is the last one. This flag makes every backward accumulate.
            args.disable_parameter_transpose_cache = True
        plan = _plan(args)
        warnings = prove_batches(args, plan)
        if args.rank == 0:
            print("\n".join([f"> {plan}", *(f"> WARNING: {line}" for line in warnings)]), flush=True)
        return result

    return validate_args


def with_our_schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: return one `ForwardBackward` for all steps of this process."""

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        state = session.SESSION.state
        if "seq1f1b.schedule" not in state:
            state["seq1f1b.schedule"] = _forward_backward()
        return state["seq1f1b.schedule"]

    return get_forward_backward_func


def _plan(args: Namespace) -> Any:
    import torch

    from megatron.longseq.pipeline.plan.from_args import plan_from_args

    return plan_from_args(args, one_queue=torch.cuda.is_available() and has_one_queue())


def _forward_backward() -> Any:
    from megatron.training import get_args

    from megatron.longseq.pipeline.forward_backward import ForwardBackward
    from patches.guards.runtime import current_record
    from patches.packed.model import packed_reader
    from patches.usp.conditions import spreads_segments
    from patches.usp.runtime import current_context

    args, record = get_args(), current_record()
    plan, by_documents = _plan(args), args.seq1f1b_partition == BY_DOCUMENTS
    if args.zero_bubble:  # its order depends on the padded vocabulary, which is known only now
        prove_batches(args, plan)
    return ForwardBackward(
        plan=plan,
        needs_mask=args.reset_attention_mask,
        sends_documents=args.create_attention_mask_in_dataloader,
        context=current_context() if spreads_segments(args) else None,
        document_cuts=_document_cuts(args) if by_documents else None,
        packed=packed_reader() if args.seq1f1b_splits > 1 else None,
        patience=args.pipeline_patience,
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
        trace=functools.partial(write_trace, Path(args.pipeline_trace)) if args.pipeline_trace else None,
        trace_step=args.pipeline_trace_step,
        after_microbatch=None if record is None else record.after_microbatch,
        wants_times=times_of(args),
    )


def _document_cuts(args: Namespace) -> Any:
    from megatron.core import parallel_state
    from megatron.training import print_rank_0

    from megatron.longseq.attention.runtime.comm import GroupCollectives
    from megatron.longseq.pipeline.plan.from_args import document_cutter
    from megatron.longseq.pipeline.runtime.document_cuts import DocumentCuts

    groups = (
        parallel_state.get_tensor_and_context_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    return DocumentCuts(
        document_cutter(args),
        args.seq1f1b_splits,
        args.seq_length,
        [GroupCollectives(group) for group in groups if group.size() > 1],
        lambda line: print_rank_0(f"> {line}"),
    )


def _refuse_partition(args: Namespace) -> None:
    """Refuse a cut by documents where samples have none.

    Raises:
        ValueError: names the flags that pack documents.
    """
    from patches.packed.conditions import packs_documents

    if args.seq1f1b_partition == BY_DOCUMENTS and not packs_documents(args):
        raise ValueError(
            "--seq1f1b-partition documents: it reads the documents of a step from its samples before the step begins, "
            "but no flag packs documents there; give --dataloader-inter-document-masking, --sft or "
            "--reset-attention-mask, or --seq1f1b-partition balanced."
        )


def write_trace(folder: Path, schedule: Any, rank: int, spans: Any) -> None:
    """Write the measured actions of a step to a folder, on the ranks of one pipeline.

    Args:
        folder: folder of the step.
        schedule: the schedule that ran.
        rank: pipeline rank.
        spans: its actions with their times.
    """
    from megatron.core import mpu

    from megatron.longseq.pipeline.runtime.step_timer import write_measured

    if mpu.get_data_parallel_rank(with_context_parallel=True) == 0 and mpu.get_tensor_model_parallel_rank() == 0:
        write_measured(folder, rank, schedule.pipeline, f"{schedule.name}, measured", spans)
