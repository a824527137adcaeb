"""Find the checkpoint that a run continues from: the newest complete one, whatever the tracker file says."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron.longseq.checkpoints import manifest
from megatron.longseq.checkpoints.commit import RELEASE, has_interrupted_commit, recover
from megatron.longseq.checkpoints.faults import TRACKER, find_folder_fault, iteration_folder

Check = Literal["digests", "sizes"]
_ITERATION = re.compile(r"iter_(\d+)")


@dataclass
class Choice:
    """The checkpoint that all ranks load.

    Attributes:
        name: of its folder; None if there is no complete one.
        skipped: what is wrong with the checkpoints that would have come first.
        tracked: name of the folder that the tracker file names; None if it names none.
    """

    name: str | None
    skipped: list[str] = field(default_factory=list)
    tracked: str | None = None

    @property
    def iteration(self) -> int:
        """Iteration of the checkpoint; 0 for a release, as upstream has it."""
        found = _ITERATION.fullmatch(self.name or "")
        return int(found[1]) if found else 0


def has_checkpoint(folder: Path, *, is_owner: bool = False) -> bool:
    """Return whether a folder names a checkpoint, or holds a complete one. What an interrupted save has left is none.

    Args:
        folder: upstream's --load.
        is_owner: whether this run would complete an interrupted commit, see `choose_checkpoint`.
    """
    # Another rank may complete a commit in the meantime, so look for those first.
    if (folder / TRACKER).is_file() or (is_owner and has_interrupted_commit(folder)):
        return True
    return any(find_folder_fault(folder / name) is None for name in _iterations(folder))


def was_committed(folder: Path) -> bool:
    """Return whether a save into a folder was ever finished."""
    return (folder / TRACKER).is_file() or any(_committed(folder / name) for name in _iterations(folder))


def choose_checkpoint(folder: Path, check: Check, group: dist.ProcessGroup | None, *, is_owner: bool = False) -> Choice:
    """Choose the newest complete checkpoint of a folder; all ranks get the same one.

    The checkpoint that the tracker file names comes first, and older ones follow. If the file is missing or damaged, or
    was written before a newer checkpoint was committed, the newest one comes first.

    Args:
        folder: upstream's --load.
        check: what has to agree with the manifest: sizes of files, or also checksums of everything. The ranks share
            the reading.
        group: of all ranks; None in a process that has none.
        is_owner: whether this run saves into the folder. Commits that were interrupted are then completed. Otherwise
            they may be at work in another run, and nothing is changed.
    """
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    choice = Choice(None)
    candidates: Iterator[str] = iter(())
    if rank == 0:
        if is_owner:
            recover(folder)
        choice.tracked, names = _candidates(folder)
        candidates = _undamaged(folder, names, choice.skipped)
    while True:
        choice.name = next(candidates, None)
        if group is not None:
            shared = [choice]
            dist.broadcast_object_list(shared, group=group, group_src=0)
            choice = shared[0]
        if choice.name is None or check == "sizes":
            return choice
        fault = _content_fault(folder / choice.name, rank, ranks)
        if group is not None:
            faults: list[str | None] = [None] * ranks
            dist.all_gather_object(faults, fault, group=group)
            fault = next(filter(None, faults), None)
        if fault is None:
            return choice
        if rank == 0:
            choice.skipped.append(fault)


def choose_newest(
    folders: Sequence[Path], check: Check, choose: Callable[[Path, Check], Choice]
) -> tuple[Path, Choice]:
    """Choose the newest complete checkpoint of two folders, and read no more of the other one than sizes of files.

    Args:
        folders: the two folders. At the same iteration, the first one is taken.
        check: see `choose_checkpoint`.
        choose: `choose_checkpoint` with its other arguments.

    Returns:
        The folder that the checkpoint is in, and the choice.
    """
    likely = {folder: choose(folder, "sizes") for folder in folders}
    first, second = sorted(folders, key=lambda folder: likely[folder].iteration, reverse=True)
    taken = choose(first, check)
    if taken.name is not None and taken.iteration >= likely[second].iteration:
        other = likely[second]
    else:
        other = choose(second, check)
    if taken.name is None or other.iteration > taken.iteration:
        first, taken, other = second, other, taken
    taken.skipped = [*other.skipped, *taken.skipped]
    return first, taken


def find_content_fault(checkpoint: Path, group: dist.ProcessGroup | None) -> str | None:
    """Compare one checkpoint with its checksums; the ranks share the reading and all return the same.

    Args:
        checkpoint: folder of one iteration.
        group: all ranks that take part; None: this process alone.

    Returns:
        A message that names the file and the tensor, or None.
    """
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    fault = _content_fault(checkpoint, rank, ranks)
    if group is None:
        return fault
    faults: list[str | None] = [None] * ranks
    dist.all_gather_object(faults, fault, group=group)
    return next(filter(None, faults), None)


def _iterations(folder: Path) -> Iterator[str]:
    """Yield the names of checkpoint folders, the newest first."""
    names = [path.name for path in folder.glob("iter_*") if _ITERATION.fullmatch(path.name) and path.is_dir()]
    yield from sorted(names, key=_number, reverse=True)


def _number(name: str) -> int:
    return int(name.removeprefix("iter_"))


def _candidates(folder: Path) -> tuple[str | None, list[str]]:
    """Return what the tracker file names, and the checkpoints to examine, in order."""
    names = list(_iterations(folder))
    tracker = folder / TRACKER
    tracked, written = None, 0
    with contextlib.suppress(OSError):
        tracked, written = iteration_folder(tracker.read_bytes()), tracker.stat().st_mtime_ns
    if tracked is None:
        return None, names
    at = -1 if tracked == RELEASE else _number(tracked)
    newer = [name for name in names if _number(name) > at and _committed(folder / name) > written]
    if tracked == RELEASE:
        return tracked, [*newer, RELEASE]
    older = [name for name in names if _number(name) < at]
    others = [name for name in names if _number(name) > at and name not in newer]
    return tracked, [*newer, tracked, *older, *others]


def _committed(checkpoint: Path) -> int:
    """Return when a checkpoint was completed, in ns; 0 if it has no manifest."""
    with contextlib.suppress(OSError):
        return (checkpoint / manifest.NAME).stat().st_mtime_ns
    return 0


def _undamaged(folder: Path, names: list[str], skipped: list[str]) -> Iterator[str]:
    """Yield the names of complete checkpoints, and note what is wrong with the others."""
    for name in names:
        checkpoint = folder / name
        try:
            fault = find_folder_fault(checkpoint) if checkpoint.is_dir() else f"there is no checkpoint {checkpoint}."
        except Exception as error:  # the other ranks wait for the choice
            fault = _not_examined(checkpoint, error)
        if fault is None:
            yield name
        else:
            skipped.append(fault)


def _content_fault(checkpoint: Path, rank: int, ranks: int) -> str | None:
    """Return what is wrong with this rank's share of a checkpoint. Only checkpoints with a manifest have checksums."""
    try:
        found = manifest.read_manifest(checkpoint)
        return None if found is None else manifest.find_content_fault(checkpoint, found, rank, ranks)
    except Exception as error:  # it must reach the other ranks, which wait for this one
        return _not_examined(checkpoint, error)


def _not_examined(checkpoint: Path, error: Exception) -> str:
    return f"{checkpoint} cannot be examined ({type(error).__name__}: {error})."
