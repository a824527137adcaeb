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

    def count(batch: Any) -> None:
        add_step(list(batch.lengths))
        # Upstream saves `args` in checkpoints: after this step, or before it if it rejects the step's result.
        args.flexsp_documents = {batch.step: batch.samples.start, batch.step + 1: batch.samples.stop}

    domain = parallel_state.get_data_parallel_group(with_context_parallel=True)
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    report = StepReport(
        domain,
        args.log_interval,
        args.pipeline_model_parallel_size,
        lambda line: print_rank_0(f"> {line}"),
        count,
        args.flexsp_refit,
        args.flexsp_save_cost,
    )
    groups = open_groups(domain, group_places(args), timeout)
    runner = StepRunner(groups, get_tokenizer().eod, sharing_ranks(args), report)
    # Layers are built with the strategy of one rank; every micro-batch brings that of its own group.
    masks = MaskReader(GroupCollectives(parallel_state.get_context_parallel_group()), 0)
    return runner, ContextParallel({"p2p": single_rank_strategy()}, masks)


def with_documents_of_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`: note how many documents the run of the checkpoint has trained."""

    def _load_base_checkpoint(load_dir: Any, args: Namespace, *rest: Any, **named: Any) -> Any:
        found = original(load_dir, args, *rest, **named)
        state = found[0] or {}
        iteration, documents = state.get("iteration"), getattr(state.get("args"), "flexsp_documents", None)
        if isinstance(documents, dict):
            documents = documents.get(iteration)
        if documents is not None:
            args.flexsp_saved = (iteration, documents)
        return found

    return _load_base_checkpoint


def with_planned_iterators(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `build_train_valid_test_data_iterators`: refuse a script whose iterators do not yield planned steps.

    Raises:
        ValueError: on every rank that has such an iterator, or none.
    """

    def build_train_valid_test_data_iterators(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        from megatron.longseq.flexsp.runtime.steps import check_iterator

        found = original(*args, **kwargs)
        flags = get_args()
        wanted = (flags.do_train and not flags.skip_train, flags.do_valid, flags.do_test)
        for iterator, is_used in zip(found, wanted, strict=True):
            if is_used:
                check_iterator(getattr(iterator, "iterable", iterator))
        return found

    return build_train_valid_test_data_iterators


def with_planned_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: a step has the micro-batches of its plan."""

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(session.SESSION.state[GROUPS].run, original(*args, **kwargs))

    return get_forward_backward_func
