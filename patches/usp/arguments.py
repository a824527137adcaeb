"""Callback at upstream's validation of flags: choose a layout before it, refuse unsupported flags after it."""

import inspect
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.attention.arguments import refuse_unserved_context, refuse_unserved_te_attention
from patches.conditions import has_local_layers
from patches.environment import node_ranks
from patches.usp.conditions import has_transformer_engine, spreads_attention, spreads_segments


def with_context_plan(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: choose for --context-parallel-auto, then refuse unsupported flags.

    Raises:
        ValueError: Flags cannot be combined, or heads or lengths do not fit the layout.
    """

    def validate_args(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        from megatron.longseq.attention.plan.comm_type import choose_comm_type, comm_types, validate_comm_types
        from megatron.longseq.pipeline.plan.from_args import segment_lengths

        refuse_unserved_te_attention(args, is_installed=has_transformer_engine())
        is_chosen = args.context_parallel_auto
        if is_chosen:
            choose_comm_type(args, node_ranks() or 1)
        if spreads_attention(args):
            comm_types(args)  # upstream would also refuse wrong sizes, but does not name the right ones
        result = original(args, defaults or {})
        if not spreads_attention(args):
            _refuse_ours_alone(args)
            return result
        # Segments replace the core attention of a layer, whichever its spec names.
        refuse_unserved_context(args, is_local=has_local_layers(args) or spreads_segments(args))
        _refuse_order(args)
        types = validate_comm_types(args, segment_lengths(args))
        if args.rank == 0:
            layers = "" if has_local_layers(args) else " in TransformerEngine's layers"
            for name, one in types.items():
                keys = ", all-gather of keys" if one.gathers else ""
                chosen = ", chosen by --context-parallel-auto" if is_chosen else ""
                print(
                    f"> attention over {one.mesh.size} context-parallel ranks ({name}){layers}: Ulysses "
                    f"{one.mesh.ulysses} x ring {one.mesh.ring}{keys}{chosen}",
                    flush=True,
                )
        return result

    return validate_args


def _refuse_ours_alone(args: Namespace) -> None:
    """Refuse flags that TransformerEngine's context parallelism does not have."""
    for flag, is_given in (
        ("--ring-window", args.ring_window is not None),
        ("--context-parallel-placement", args.context_parallel_placement != "head-first"),
        ("--context-parallel-layout", args.context_parallel_layout != "auto"),
    ):
        if is_given:
            raise ValueError(
                f"{flag}: TransformerEngine's attention does not have this; give --context-parallel-attention longseq."
            )


def _refuse_order(args: Namespace) -> None:
    if args.context_parallel_placement == "head-first":
        return
    import torch.distributed as dist

    if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        raise ValueError(
            "--context-parallel-placement context-first: this PyTorch sorts the ranks of every group (new_group has "
            "no argument sort_ranks); install a later version, or give head-first."
        )
