"""Save atomically, with checksums of the live state, and refuse states that are not finite."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.longseq.checkpoints.commit import is_checkpoint_folder
from megatron.longseq.checkpoints.saving import NonFiniteState, save_atomically


def with_commit(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `dist_checkpointing.save`: write into another folder, which gets its name once it is complete.

    Folders that are no checkpoints of a training, and paths of a storage service, are left to upstream.
    """
    signature = inspect.signature(original)
    under_way: set[Path] = set()  # folders of saves in the background that are not committed

    def save(*args: Any, **named: Any) -> Any:
        import torch.distributed as dist
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
        from megatron.training.async_utils import maybe_finalize_async_save

        call = signature.bind(*args, **named)
        call.apply_defaults()
        folder = Path(call.arguments["checkpoint_dir"])
        if "://" in str(call.arguments["checkpoint_dir"]) or not is_checkpoint_folder(folder):
            return original(*args, **named)
        if call.arguments["sharded_strategy"] is None:
            call.arguments["sharded_strategy"] = TorchDistSaveShardedStrategy()

        if folder in under_way:  # upstream saves a step again, for example where the size of its batches changes
            maybe_finalize_async_save(blocking=True)

        def save_into(place: str) -> Any:
            call.arguments["checkpoint_dir"] = place
            return original(*call.args, **call.kwargs)

        request = save_atomically(
            save_into,
            folder,
            call.arguments["sharded_strategy"],
            dist.group.WORLD,
            in_background=call.arguments["async_sharded_save"],
        )
        if request is not None:
            under_way.add(folder)
            request.add_finalize_fn(lambda: under_way.discard(folder))
        return request

    return save


def with_refused_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `save_checkpoint`: with --ckpt-non-finite skip, a refused state is reported, and the run goes on.

    Raises:
        NonFiniteState: on all ranks, without that flag.
    """

    def save_checkpoint(*args: Any, **named: Any) -> Any:
        from megatron.training import get_args

        try:
            return original(*args, **named)
        except NonFiniteState as refusal:
            run = get_args()
            if getattr(run, "ckpt_non_finite", "stop") != "skip":
                raise
            if run.rank == 0:
                print(f"> WARNING: {refusal.found}", flush=True)
            return None

    return save_checkpoint
