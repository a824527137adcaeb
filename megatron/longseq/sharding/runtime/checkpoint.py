"""Check that a sharded run can resume from a checkpoint: its optimizer states have the right form and weights."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron.longseq.sharding.arguments import wants_sharding
from megatron.longseq.sharding.plan.strategy import Strategy
from megatron.longseq.sharding.runtime.bucket_storage import ParamStore
from megatron.longseq.sharding.runtime.state import cut

READ_EVERYWHERE = "fully_reshardable"  # upstream's form of optimizer states that has the shapes of parameters
MISMATCH = 0.02  # of a tensor's norm: far above what rounding to bf16 changes, far below what another tensor would


def describe_run(args: Any) -> str:
    """Return how a run's model states are sharded, from its arguments; those that a checkpoint lacks are left out."""
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
    """Return whether upstream will read the checkpoint's optimizer states.

    Args:
        args: of this run.
        saved: the arguments in the checkpoint.
        is_release: whether the checkpoint is a release, which has weights only.
    """
    return not (args.finetune or args.no_load_optim or is_release or getattr(saved, "no_save_optim", False))


def refuse_bound_states(args: Namespace, saved: Any, form: str | None, place: str) -> None:
    """Refuse optimizer states that can be read only with the layout that saved them.

    Args:
        args: of this run.
        saved: the arguments in the checkpoint.
        form: of the checkpoint's optimizer states (`distrib_optim_sharding_type`); None: a plain optimizer's.
        place: path of the checkpoint.

    Raises:
        ValueError: the states cannot be read; the message names both layouts and what to do.
    """
    if form == READ_EVERYWHERE:
        return
    if form is None:
        why, how = "in full on every rank", "Upstream reads them only without --use-distributed-optimizer"
    else:
        why = f"as {form}, in the buckets of that run"
        how = (
            "To convert them, resume once as that run was, with --dist-ckpt-optim-fully-reshardable and without "
            "--overlap-grad-reduce, and load what that saves"
        )
        if getattr(saved, "overlap_grad_reduce", False):
            how = (
                "With --overlap-grad-reduce upstream cut them into buckets that no other form takes over unharmed "
                "(its issue 504)"
            )
    raise ValueError(
        f"{place} was saved by {describe_run(saved)}, with optimizer states {why}; this run is {describe_run(args)} "
        f"and reads {READ_EVERYWHERE} ones. {how}. Or give --no-load-optim to load only the weights and start with "
        "new optimizer states."
    )


@contextmanager
def matching_weights(optimizer: Any, stores: Mapping[torch.nn.Parameter, ParamStore]) -> Iterator[None]:
    """Compare main parameters, which are loaded inside, with the weights, which were loaded before.

    Upstream's distributed optimizer, with several padded buckets, silently writes tensors of other parameters into a
    fully reshardable checkpoint (its issue 504).

    Args:
        optimizer: the distributed optimizer.
        stores: of its parameters.

    Raises:
        ValueError: on a rank that keeps a shard of such a parameter; the message names the first one.
    """
    weights = {}
    for param, store in stores.items():
        if param in optimizer.model_param_group_index_map:
            span = optimizer._get_model_param_range_map(param)["gbuf_world_in_bucket"]
            weights[param] = cut(store.shard, range(span.start, span.end), store.shard_range.start).clone()
    yield
    for param, weight in weights.items():
        main = optimizer._get_main_param_and_optimizer_states(param)["param"].detach()
        apart = float((main.to(weight.dtype) - weight).float().norm() / weight.float().norm().clamp_min(1e-30))
        if not apart <= MISMATCH:
            raise ValueError(
                f"rank {torch.distributed.get_rank()}: optimizer states of {optimizer._param_name(param)} do not "
                f"match the weights in the checkpoint: main parameters differ by {apart:.1%} of the norm. Upstream's "
                "distributed optimizer saves wrong fully reshardable states if there are several padded buckets, as "
                "with --overlap-grad-reduce (its issue 504). The weights are correct: give --no-load-optim to load "
                "only them and start with new optimizer states."
            )
