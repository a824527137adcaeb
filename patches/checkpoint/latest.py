"""Load the newest complete checkpoint, whatever the tracker file says. All ranks load the same one."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.longseq.checkpoints.commit import RELEASE
from megatron.longseq.checkpoints.faults import TRACKER, find_fault
from megatron.longseq.checkpoints.latest import (
    Check,
    Choice,
    choose_checkpoint,
    choose_newest,
    find_content_fault,
    has_checkpoint,
    was_committed,
)
from patches.engine.session import SESSION

_STATE = "checkpoint.latest"  # tracker files, and what upstream is to read in them, while it loads a checkpoint
NOTHING = -1  # upstream's iteration if there is no checkpoint
NON_PERSISTENT = "non_persistent"  # upstream's folder in --load


def with_complete_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint`: choose the checkpoint first. Rank 0 says which damaged ones it has skipped.

    Raises:
        ValueError: on all ranks: the folder has had checkpoints, and none is complete; or the one that --ckpt-step
            names is damaged.
    """
    chosen: dict[str, tuple[Path, Choice]] = {}

    def _load_base_checkpoint(load_dir: Any, args: Namespace, rank0: bool = False, *rest: Any, **named: Any) -> Any:
        if load_dir is None or "://" in str(load_dir):
            return original(load_dir, args, rank0, *rest, **named)
        folder = Path(load_dir)
        non_persistent = _non_persistent_folder(folder, args)
        if non_persistent is None and not folder.is_dir():
            return original(load_dir, args, rank0, *rest, **named)
        if args.ckpt_step:
            if rank0:
                _refuse_damaged(folder / f"iter_{args.ckpt_step:07d}", args)
            with _in_place_of(non_persistent, None):
                return original(load_dir, args, rank0, *rest, **named)
        # Upstream reads the common part first, with rank0, and then the tensors of the same checkpoint.
        found = None if rank0 else chosen.pop(str(folder), None)
        if found is None:
            found = _choose(folder, non_persistent, args)
            if not _reads_before_the_ranks_are_connected(args):
                chosen[str(folder)] = found
        place, choice = found
        if choice.name is None or (place == folder and choice.name in (choice.tracked, RELEASE)):
            with _in_place_of(non_persistent, None):
                return original(load_dir, args, rank0, *rest, **named)
        args.ckpt_step = choice.iteration  # for a folder without that file
        try:
            with (
                _in_place_of(non_persistent, choice.iteration if place == non_persistent else None),
                _in_place_of(folder, choice.iteration),
            ):
                return original(load_dir, args, rank0, *rest, **named)
        finally:
            args.ckpt_step = None

    return _load_base_checkpoint


@contextmanager
def _in_place_of(folder: Path | None, iteration: int | None) -> Iterator[None]:
    """Let upstream read an iteration in place of what a folder's tracker file says; None: that there is none."""
    if folder is None:
        yield
        return
    overrides, tracker = SESSION.state.setdefault(_STATE, {}), os.path.abspath(folder / TRACKER)
    overrides[tracker] = NOTHING if iteration is None else iteration
    try:
        yield
    finally:
        del overrides[tracker]


def _non_persistent_folder(folder: Path, args: Namespace) -> Path | None:
    """Return the folder of non-persistent checkpoints, which upstream prefers if they are newer; None: it has none."""
    if getattr(args, "non_persistent_ckpt_type", None) != "global":
        return None
    place = args.non_persistent_global_ckpt_dir or folder / NON_PERSISTENT
    return Path(place) if "://" not in str(place) and (Path(place) / TRACKER).is_file() else None


def _choose(folder: Path, non_persistent: Path | None, args: Namespace) -> tuple[Path, Choice]:
    """Choose the checkpoint to load, and say what was skipped. Returns the folder that it is in, and the choice."""

    def choose(place: Path, check: Check) -> Choice:
        is_owner = _is_owner(folder, args) or (place == non_persistent and bool(args.non_persistent_global_ckpt_dir))
        return choose_checkpoint(place, check, _group(), is_owner=is_owner)

    # Before the ranks are connected, for --use-checkpoint-args, each would read all tensors. They are compared later.
    check: Check = "sizes" if _reads_before_the_ranks_are_connected(args) else args.ckpt_verify
    place, choice = folder, Choice(None)
    if non_persistent is None:
        choice = choose(folder, check)
    else:
        place, choice = choose_newest((non_persistent, folder), check, choose)
    if place == folder:
        _refuse_other_file_format(folder, choice, args)
    _report(folder, place, choice, args)
    return place, choice


def _reads_before_the_ranks_are_connected(args: Namespace) -> bool:
    return _group() is None and getattr(args, "world_size", 1) > 1


def with_chosen_iteration(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `read_metadata`: return the iteration of the checkpoint that was chosen in place of the tracker file's."""

    def read_metadata(tracker_filename: Any) -> Any:
        iteration = SESSION.state.get(_STATE, {}).get(os.path.abspath(str(tracker_filename)))
        return original(tracker_filename) if iteration is None else (iteration, False)

    return read_metadata


def with_untracked_checkpoints(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `checkpoint_exists`: checkpoints exist without the tracker file, too."""

    def checkpoint_exists(checkpoints_path: Any) -> Any:
        if checkpoints_path is None or "://" in str(checkpoints_path):
            return original(checkpoints_path)
        folder = Path(checkpoints_path)
        return original(checkpoints_path) or has_checkpoint(folder, is_owner=_is_owner(folder, _arguments()))

    return checkpoint_exists


def _is_owner(folder: Path, args: Namespace) -> bool:
    """Return whether this run saves into a folder. An evaluation has --save too, beside a run that saves there."""
    save = getattr(args, "save", None)
    if not save or "://" in str(save) or getattr(args, "skip_train", False):
        return False
    return Path(save).resolve() == folder.resolve()


def _arguments() -> Namespace:
    from megatron.training import get_args

    try:
        return get_args()
    except AssertionError:  # a script asks before it has parsed them
        return Namespace()


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


def _report(folder: Path, place: Path, choice: Choice, args: Namespace) -> None:
    """Say what was skipped, and refuse to begin again where there have been checkpoints."""
    if choice.name is None:
        if was_committed(folder):
            none = f"{' '.join(choice.skipped)} There is no other complete checkpoint in {folder}: give another --load."
            raise ValueError(f"rank {args.rank}: {find_fault(folder) or none}")
        taken = "There is no complete checkpoint, and no save was ever finished: the run starts from the beginning."
    else:
        taken = f"{choice.name if place == folder else place / choice.name} is loaded instead."
    if choice.skipped and args.rank == 0:
        print(f"> WARNING: {' '.join(choice.skipped)} {taken}", flush=True)


def _refuse_damaged(checkpoint: Path, args: Namespace) -> None:
    """Refuse a checkpoint that was asked for and differs from what was saved."""
    is_for_later = args.ckpt_verify != "digests" or _reads_before_the_ranks_are_connected(args)
    if is_for_later or not checkpoint.is_dir():
        return
    fault = find_content_fault(checkpoint, _group())
    if fault is not None:
        raise ValueError(
            f"rank {args.rank}: {fault} Give another --ckpt-step, or none to load the newest complete one."
        )
