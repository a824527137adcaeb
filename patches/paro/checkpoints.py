"""A checkpoint's own account of how it was saved, read before anything is loaded from it."""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.sharding.runtime.checkpoint import loads_optimizer, refuse_bound_states, told


def with_manifest(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the reading of a checkpoint: refuse, on every rank, optimizer states that sharding cannot read.

    Every rank reads the common part first (`rank0`), before any of them asks for tensors.

    Raises:
        ValueError: see `refuse_bound_states`.
    """

    @functools.wraps(original)
    def _load_base_checkpoint(load_dir: Any, args: Namespace, rank0: bool = False, *rest: Any, **named: Any) -> Any:
        found = original(load_dir, args, rank0, *rest, **named)
        common, place, is_release, _ = found
        if not rank0 or not common:
            return found
        saved = common.get("args")
        if loads_optimizer(args, saved, is_release):
            form = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
            refuse_bound_states(args, saved, form, str(place))
        if args.rank == 0 and saved is not None and told(saved) != told(args):
            print(f"> {place} was saved by {told(saved)}; this run is {told(args)}", flush=True)
        return found

    return _load_base_checkpoint
