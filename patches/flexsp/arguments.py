"""Upstream's validation of its flags, with what --flexsp sets and refuses."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.flexsp.arguments import refuse_unserved_flexsp
from patches.conditions import no_cuda
from patches.environment import node_ranks


def with_flexible_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: sum losses over tokens, and refuse what FlexSP does not support.

    Raises:
        ValueError: Flags do not go together, or no plan could hold a document.
    """

    def validate_args(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        from megatron.training.utils import get_blend_and_blend_per_split

        from megatron.longseq.flexsp.from_args import check_batches, check_plannable
        from megatron.longseq.flexsp.runtime.conversations import check_conversations, jsonl_files

        refuse_unserved_flexsp(args)
        # A token has one weight wherever it is computed only if the loss is summed and divided by all tokens at once.
        args.calculate_per_token_loss = True
        result = original(args, defaults or {})
        refuse_unserved_flexsp(args)
        args.dataloader_type = "external"  # the script's iterators yield planned steps
        if args.pipeline_model_parallel_size > 1:
            args.variable_seq_lengths = True
            args.moe_token_dispatcher_type = "alltoall"  # upstream refuses its default here even without experts
        args.flexsp_node_ranks = node_ranks()
        check_plannable(args, on_gpu=not no_cuda(args))
        blends = get_blend_and_blend_per_split(args)
        check_batches(args, *blends)
        if args.sft:
            check_conversations(args, jsonl_files(*blends))
        if args.rank == 0:
            print("> FlexSP: losses are summed over the tokens of a step (--calculate-per-token-loss)", flush=True)
        return result

    return validate_args
