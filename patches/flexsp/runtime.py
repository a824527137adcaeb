"""Process groups of FlexSP, and the steps that run in them."""

import functools
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from patches.engine import session

GROUPS, ATTENTION = "flexsp.groups", "flexsp.attention"


def with_groups_of_all_degrees(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `initialize_megatron`: afterwards, create the process groups of all degrees and kinds."""

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.training import get_args

        finish = original(*args, **kwargs)
        if callable(finish):  # with --lazy-mpu-init the caller connects the ranks later, by this function
            return with_groups_of_all_degrees(finish)
        if parallel_state.model_parallel_is_initialized():
            session.SESSION.state[GROUPS], session.SESSION.state[ATTENTION] = _open(get_args())
        return finish

    return initialize_megatron


def _open(args: Namespace) -> tuple[Any, Any]:
    from megatron.core import parallel_state
    from megatron.training import get_tokenizer, print_rank_0

    from megatron.longseq.attention.module import ContextParallel
    from megatron.longseq.attention.runtime.comm import GroupCollectives
    from megatron.longseq.attention.runtime.document_attention import single_rank_strategy
    from megatron.longseq.attention.runtime.packed_documents import MaskReader
    from megatron.longseq.flexsp.from_args import group_places, sharing_ranks
    from megatron.longseq.flexsp.runtime.groups import open_groups
    from megatron.longseq.flexsp.runtime.report import StepReport
    from megatron.longseq.flexsp.runtime.runner import StepRunner
    from patches.log.documents import add_step

    domain = parallel_state.get_data_parallel_group(with_context_parallel=True)
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    report = StepReport(
        domain,
        args.log_interval,
        args.pipeline_model_parallel_size,
        lambda line: print_rank_0(f"> {line}"),
        lambda batch: add_step(list(batch.lengths)),
        args.flexsp_refit,
        args.flexsp_save_cost,
    )
    groups = open_groups(domain, group_places(args), timeout)
    runner = StepRunner(groups, get_tokenizer().eod, sharing_ranks(args), report)
    # Layers are built with the strategy of one rank; every micro-batch brings that of its own group.
    masks = MaskReader(GroupCollectives(parallel_state.get_context_parallel_group()), 0)
    return runner, ContextParallel({"p2p": single_rank_strategy()}, masks)


def with_planned_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: a step has the micro-batches of its plan."""

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(session.SESSION.state[GROUPS].run, original(*args, **kwargs))

    return get_forward_backward_func
