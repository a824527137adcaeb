"""Save a checkpoint in a folder of its own, and give it its name once it is complete.

    saving_iter_0000003    while the ranks write; the manifest comes last
    iter_0000003           by one rename
    replaced_iter_0000003  for a moment, where a checkpoint of this name existed

At every moment the folder holds the last complete checkpoint under one of these names, and no incomplete one as
`iter_...`.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron.longseq.checkpoints.faults import TRACKER, iteration_folder
from megatron.longseq.checkpoints.manifest import Item, find_size_fault, read_manifest, write_manifest

RELEASE = "release"
CHECKPOINT = re.compile(rf"iter_\d+|{RELEASE}")
_SAVING, _REPLACED = "saving_", "replaced_"


def is_checkpoint_folder(folder: Path) -> bool:
    """Return whether this is a folder of upstream's: of an iteration, or of a release."""
    return CHECKPOINT.fullmatch(folder.name) is not None


def saving_folder(folder: Path) -> Path:
    """Return where a checkpoint is written before it is committed as `folder`."""
    return folder.with_name(f"{_SAVING}{folder.name}")


def begin(folder: Path) -> None:
    """Create the folder to write into, and remove what an interrupted save has left there. One rank calls this.

    Args:
        folder: of the checkpoint.
    """
    saving = saving_folder(folder)
    _remove(saving)
    saving.mkdir(parents=True)
    with contextlib.suppress(OSError):
        folder.rmdir()  # upstream creates it ahead of a save; one with files in it stays


def abandon(folder: Path) -> None:
    """Remove what has been written of a checkpoint that is not committed. One rank calls this."""
    shutil.rmtree(saving_folder(folder), ignore_errors=True)


def commit(folder: Path, items: Sequence[Item]) -> None:
    """Write the manifest, and give the checkpoint its name. One rank calls this when all have written.

    Args:
        folder: of the checkpoint.
        items: of all ranks, see `megatron.longseq.checkpoints.manifest.items_of`.
    """
    saving, replaced = saving_folder(folder), _replaced_folder(folder)
    write_manifest(saving, items)
    for file in saving.iterdir():
        if file.suffix != ".distcp":  # their writers have done so
            _flush(file)
    _flush(saving)
    if folder.exists():
        _remove(replaced)
        folder.rename(replaced)
    saving.rename(folder)
    _remove_other_tracker(folder.parent / TRACKER)
    _flush(folder.parent)
    _remove(replaced)


def _remove_other_tracker(tracker: Path) -> None:
    """Remove a tracker file that names no iteration. Upstream writes it next, and would first read a number in it."""
    with contextlib.suppress(FileNotFoundError):
        if iteration_folder(tracker.read_bytes()) in (None, RELEASE):
            tracker.unlink()


def recover(parent: Path) -> list[str]:
    """Complete commits that were interrupted between two renames, and remove what interrupted saves have left.

    One rank of the run that saves into the folder calls this, while no rank saves.

    Args:
        parent: folder of the checkpoints. If it cannot be written to, nothing is changed.

    Returns:
        Names of the checkpoints that have their names again.
    """
    recovered = []
    for saving in sorted(parent.glob(f"{_SAVING}*")):
        folder = parent / saving.name.removeprefix(_SAVING)
        if not is_checkpoint_folder(folder):
            continue
        with contextlib.suppress(OSError):
            if _is_complete(saving) and not folder.exists():
                saving.rename(folder)
                recovered.append(folder.name)
            else:
                _remove(saving)
    for replaced in sorted(parent.glob(f"{_REPLACED}*")):
        folder = parent / replaced.name.removeprefix(_REPLACED)
        if not is_checkpoint_folder(folder):
            continue
        with contextlib.suppress(OSError):
            if folder.exists():
                _remove(replaced)
            else:
                replaced.rename(folder)
                recovered.append(folder.name)
    return recovered


def _replaced_folder(folder: Path) -> Path:
    return folder.with_name(f"{_REPLACED}{folder.name}")


def _remove(path: Path) -> None:
    """Remove a folder. Of a link to a folder, only the link is removed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def has_interrupted_commit(parent: Path) -> bool:
    """Return whether `recover` would give a checkpoint its name."""
    return any(_is_complete(path) for path in parent.glob(f"{_SAVING}*")) or any(parent.glob(f"{_REPLACED}*"))


def _is_complete(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    return manifest is not None and find_size_fault(folder, manifest) is None


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot do this for folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
