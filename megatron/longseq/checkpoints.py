"""What is wrong with a checkpoint that upstream could not load, looked for in its files after the failure."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILE = "model_optim_rng.pt"  # of --ckpt-format torch, per model-parallel rank
ZIP = b"PK\x03\x04"  # what torch.save's files begin with
FLAGS = {"max_lr": "--lr", "min_lr": "--min-lr"}  # by the parameter groups' names


def find_fault(folder: Path, step: int | None = None) -> str | None:
    """Return what is wrong with the checkpoint that a run would load from `folder`, and what to do; None if nothing is.

    Args:
        folder: upstream's --load.
        step: upstream's --ckpt-step.
    """
    tracker = folder / TRACKER
    if tracker.is_file():
        content = tracker.read_bytes()
        latest = _iteration(content)
        if latest is None:
            return (
                f"{tracker} holds {content[:40]!r}, not the number of an iteration: its writing was interrupted, or it "
                f"was changed. {_instead(folder, f'write that number into {tracker.name}')}, or remove {tracker.name} "
                "to train from the beginning."
            )
    elif step:
        latest = None
    else:
        return None
    name = f"iter_{step:07d}" if step else latest
    assert name is not None
    place = folder / name
    if not place.is_dir():
        said = f"--ckpt-step {step} asks for it" if step else f"{tracker.name} names it"
        return f"there is no checkpoint {place}, and {said}. {_instead(folder)}."
    wrong = _wrong_inside(place)
    return None if wrong is None else f"{wrong} {_instead(folder, without=place)}."


def _iteration(content: bytes) -> str | None:
    """Return the name of the folder that a tracker file speaks of."""
    try:
        text = content.decode("utf-8").strip()
        if text == "release":
            return text
        return f"iter_{int(text):07d}" if int(text) >= 0 else None
    except ValueError:
        return None


def _instead(folder: Path, how: str = "", without: Path | None = None) -> str:
    """Say which checkpoint of the folder is whole."""
    for place in sorted(folder.glob("iter_*"), reverse=True):
        number = place.name.removeprefix("iter_")
        if place != without and number.isdecimal() and _wrong_inside(place) is None:
            return f"The newest whole checkpoint is {place.name}: {how or f'give --ckpt-step {int(number)}'}"
    return f"No other whole checkpoint is in {folder}: give another --load"


def find_file_fault(file: Path) -> str | None:
    """Return what is wrong with one file of a checkpoint of --ckpt-format torch, and what to do; None if nothing is."""
    wrong = _wrong_file(file)
    place = file.parents[1]
    return None if wrong is None else f"{wrong} {_instead(place.parent, without=place)}."


def _wrong_file(file: Path) -> str | None:
    """Check that a file of torch.save is whole. It is a zip archive, whose directory is written last."""
    try:
        with file.open("rb") as stream:
            head = stream.read(len(ZIP))
    except OSError as error:
        return f"{file} cannot be read ({error.strerror}): the checkpoint was not finished, or not copied whole."
    if not head:
        return f"{file} is empty: its writing was interrupted, or it was not copied whole."
    if head == ZIP and not zipfile.is_zipfile(file):
        return f"{file} was cut short ({file.stat().st_size:,} bytes are left of it)."
    return None


def _wrong_inside(place: Path) -> str | None:
    """Return what is wrong with the files of one checkpoint."""
    ranks = sorted(place.glob("mp_rank_*"))
    if ranks:
        files = [file for rank in ranks for file in (rank / MODEL_FILE, *sorted(rank.glob("*.pt")))]
        return next(filter(None, map(_wrong_file, files)), None)
    about = place / "metadata.json"
    try:
        json.loads(about.read_text("utf-8"))
    except FileNotFoundError:
        return f"{about} is missing: the checkpoint was not finished, or not copied whole."
    except (OSError, ValueError) as error:
        return f"{about} cannot be read ({error}): the checkpoint was not finished, or not copied whole."
    return _wrong_tensors(place) if (place / ".metadata").exists() or any(place.glob("*.distcp")) else None


def _wrong_tensors(place: Path) -> str | None:
    """Compare the size of each file of tensors with what the checkpoint's `.metadata` lists in it."""
    from torch.distributed.checkpoint import FileSystemReader

    listed = place / ".metadata"
    try:
        parts = FileSystemReader(place).read_metadata().storage_data.values()
    except FileNotFoundError:
        return f"{listed} is missing: the checkpoint was not finished, or not copied whole (a name with a dot)."
    except Exception as error:
        return f"{listed} cannot be read ({error or type(error).__name__}): it was cut short or changed."
    ends: dict[str, int] = {}
    for part in parts:
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        try:
            with (place / name).open("rb") as stream:
                size = stream.seek(0, 2)
        except OSError as error:
            return f"{place / name} cannot be read ({error.strerror}); tensors of the checkpoint are in it."
        if size < end:
            return f"{place / name} has {size:,} bytes, and its tensors need {end:,}: it was cut short."
    return None


def explain_group_mismatch(keys: Sequence[str], wanted: Sequence[Any], saved: Sequence[Mapping[str, Any]]) -> str:
    """Say by which settings a parameter group is not among the saved ones.

    Args:
        keys: the settings that tell groups apart.
        wanted: their values in this run.
        saved: the checkpoint's groups.
    """

    def differing(group: Mapping[str, Any]) -> list[str]:
        pairs = [(key, value, group.get(key, group.get(f"pre_{key}"))) for key, value in zip(keys, wanted, strict=True)]
        return [f"{FLAGS.get(key, key)} is {ours}, was {theirs}" for key, ours, theirs in pairs if ours != theirs]

    nearest = min((differing(group) for group in saved), key=len, default=["the checkpoint has no parameter groups"])
    return (
        f"the optimizer cannot go on from the checkpoint: {'; '.join(nearest)}. Upstream's distributed optimizer "
        "(--use-distributed-optimizer, --paro) finds its saved parameter groups by these values, also under "
        "--override-opt-param-scheduler. Give them as they were; or give --no-load-optim: weights are read, and the "
        "optimizer starts anew."
    )
