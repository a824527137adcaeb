"""What a checkpoint says about the run that saved it, checked before anything is loaded from it."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.sharding.runtime.checkpoint import describe_run, loads_optimizer, refuse_bound_states


def with_manifest(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`: refuse, on every rank, optimizer states that a sharded run cannot read.

    Every rank reads the common part first (`rank0`), before any of them reads tensors.

    Raises:
        ValueError: see `refuse_bound_states`.
    """

    def _load_base_checkpoint(load_dir: Any, args: Namespace, rank0: bool = False, *rest: Any, **named: Any) -> Any:
        found = original(load_dir, args, rank0, *rest, **named)
        common, place, is_release, _ = found
        if not rank0 or not common:
            return found
        saved = common.get("args")
        if loads_optimizer(args, saved, is_release):
            form = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
            refuse_bound_states(args, saved, form, str(place))
        if args.rank == 0 and saved is not None and describe_run(saved) != describe_run(args):
            print(f"> {place} was saved by {describe_run(saved)}; this run is {describe_run(args)}", flush=True)
        return found

    return _load_base_checkpoint
