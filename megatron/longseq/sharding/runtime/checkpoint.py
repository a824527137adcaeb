"""What a checkpoint says about the run that saved it, and whether a sharded run can go on from its optimizer states."""

from argparse import Namespace
from typing import Any

from megatron.longseq.sharding.arguments import wants_sharding
from megatron.longseq.sharding.plan.strategy import Strategy

READ_EVERYWHERE = "fully_reshardable"  # upstream's form of optimizer states in the shapes of parameters


def told(args: Any) -> str:
    """Return how a run's states are sharded, from its arguments; those that a checkpoint lacks are left out."""
    ranks = (("DP", "data_parallel_size"), ("TP", "tensor_model_parallel_size"), ("PP", "pipeline_model_parallel_size"))
    sizes = [f"{short} {getattr(args, name)}" for short, name in ranks if hasattr(args, name)]
    return ", ".join([_strategy(args), *sizes])


def _strategy(args: Any) -> str:
    if wants_sharding(args):
        groups, size = getattr(args, "paro_groups", None), getattr(args, "paro_group_size", None)
        return f"--paro {Strategy.parse(args.paro)} in {groups} group(s) of {size}"
    if getattr(args, "use_distributed_optimizer", False):
        return "upstream's distributed optimizer"
    return "upstream's plain optimizer"


def loads_optimizer(args: Namespace, saved: Any, is_release: bool) -> bool:
    """Whether upstream will ask for the checkpoint's optimizer states."""
    return not (args.finetune or args.no_load_optim or is_release or getattr(saved, "no_save_optim", False))


def refuse_bound_states(args: Namespace, saved: Any, form: str | None, place: str) -> None:
    """Refuse optimizer states that only the layout that saved them can read.

    Args:
        args: of this run.
        saved: the arguments in the checkpoint.
        form: in which the checkpoint has optimizer states (`distrib_optim_sharding_type`); None: a plain optimizer's.
        place: of the checkpoint.

    Raises:
        ValueError: names both layouts, and says how to go on.
    """
    if form == READ_EVERYWHERE:
        return
    if form is None:
        why, how = "whole on every rank", "Upstream reads them without --use-distributed-optimizer alone"
    else:
        why = f"as {form}, in the buckets of that run"
        how = (
            "To bring them here, go on once as that run was, with --dist-ckpt-optim-fully-reshardable and without "
            "--overlap-grad-reduce, and load what that saves"
        )
        if getattr(saved, "overlap_grad_reduce", False):
            how = (
                "With --overlap-grad-reduce upstream cut them into buckets that no other form takes over unharmed "
                "(its issue 504)"
            )
    raise ValueError(
        f"{place} was saved by {told(saved)}, with optimizer states {why}; this run is {told(args)} and reads "
        f"{READ_EVERYWHERE} ones. {how}. Or give --no-load-optim: weights are read, and the optimizer starts anew."
    )
