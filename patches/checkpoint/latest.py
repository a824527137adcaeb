"""Load the newest complete checkpoint, whatever the tracker file says. All ranks load the same one."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.longseq.checkpoints.faults import TRACKER, find_fault
from megatron.longseq.checkpoints.latest import (
    RELEASE,
    Choice,
    choose_checkpoint,
    find_content_fault,
    has_checkpoint,
)
from patches.engine.session import SESSION

_STATE = "checkpoint.latest"  # tracker files, and what upstream is to read in them, while it loads a checkpoint


def with_complete_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`: choose the checkpoint first. Rank 0 says which damaged ones it has skipped.

    Raises:
        ValueError: on all ranks: the folder has had checkpoints, and none is complete; or the one that --ckpt-step
            names is damaged.
    """
    chosen: dict[str, Choice] = {}

    def _load_base_checkpoint(load_dir: Any, args: Namespace, rank0: bool = False, *rest: Any, **named: Any) -> Any:
        if load_dir is None or "://" in str(load_dir) or not Path(load_dir).is_dir():
            return original(load_dir, args, rank0, *rest, **named)
        folder = Path(load_dir)
        if args.ckpt_step:
            if rank0:
                _refuse_damaged(folder / f"iter_{args.ckpt_step:07d}", args)
            return original(load_dir, args, rank0, *rest, **named)
        # Upstream reads the common part first, with rank0, and then the tensors of the same checkpoint.
        choice = None if rank0 else chosen.pop(str(folder), None)
        if choice is None:
            choice = chosen[str(folder)] = choose_checkpoint(
                folder, args.ckpt_verify, _group(), is_owner=_is_owner(folder, args)
            )
            _refuse_other_file_format(folder, choice, args)
            _report(folder, choice, args)
        if choice.name is None or choice.name in (choice.tracked, RELEASE):
            return original(load_dir, args, rank0, *rest, **named)
        overrides = SESSION.state.setdefault(_STATE, {})
        overrides[str(folder / TRACKER)] = choice.iteration
        args.ckpt_step = choice.iteration  # for a folder without that file
        try:
            return original(load_dir, args, rank0, *rest, **named)
        finally:
            args.ckpt_step = None
            del overrides[str(folder / TRACKER)]

    return _load_base_checkpoint


def with_chosen_iteration(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `read_metadata`: return the iteration of the checkpoint that was chosen in place of the tracker file's."""

    def read_metadata(tracker_filename: Any) -> Any:
        iteration = SESSION.state.get(_STATE, {}).get(str(tracker_filename))
        return original(tracker_filename) if iteration is None else (iteration, False)

    return read_metadata


def with_untracked_checkpoints(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `checkpoint_exists`: checkpoints exist without the tracker file, too."""

    def checkpoint_exists(checkpoints_path: Any) -> Any:
        if checkpoints_path is None or "://" in str(checkpoints_path):
            return original(checkpoints_path)
        return original(checkpoints_path) or has_checkpoint(Path(checkpoints_path))

    return checkpoint_exists


def _is_owner(folder: Path, args: Namespace) -> bool:
    return bool(args.save) and "://" not in str(args.save) and Path(args.save).resolve() == folder.resolve()


def _group() -> Any:
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_backend() == "fake":
        return None
    return dist.group.WORLD


def _refuse_other_file_format(folder: Path, choice: Choice, args: Namespace) -> None:
    """Refuse to skip a checkpoint of --ckpt-format torch: upstream would read the optimizer's file from the other one.

    It reads the tracker file once more for that file, and for the iteration.
    """
    if choice.name in (None, choice.tracked, RELEASE) or not any((folder / str(choice.name)).glob("mp_rank_*")):
        return
    missing = f"{folder / TRACKER} is missing. The newest complete checkpoint is {choice.name}"
    raise ValueError(f"rank {args.rank}: {find_fault(folder) or f'{missing}: give --ckpt-step {choice.iteration}.'}")


def _report(folder: Path, choice: Choice, args: Namespace) -> None:
    """Say what was skipped, and refuse to begin again where there have been checkpoints."""
    if choice.name is None:
        if (folder / TRACKER).is_file():
            raise ValueError(f"rank {args.rank}: {find_fault(folder) or ' '.join(choice.skipped)}")
        taken = "There is no complete checkpoint, and no save was ever finished: the run starts from the beginning."
    else:
        taken = f"{choice.name} is loaded instead."
    if choice.skipped and args.rank == 0:
        print(f"> WARNING: {' '.join(choice.skipped)} {taken}", flush=True)


def _refuse_damaged(checkpoint: Path, args: Namespace) -> None:
    """Refuse a checkpoint that was asked for and differs from what was saved."""
    if args.ckpt_verify != "digests" or not checkpoint.is_dir():
        return
    fault = find_content_fault(checkpoint, _group())
    if fault is not None:
        raise ValueError(
            f"rank {args.rank}: {fault} Give another --ckpt-step, or none to load the newest complete one."
        )
