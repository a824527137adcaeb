"""Explain why upstream could not load a checkpoint, and which flags changed since one was saved."""

import json
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILE = "model_optim_rng.pt"  # --ckpt-format torch, one per model-parallel rank
ZIP = b"PK\x03\x04"  # first bytes of a file written by torch.save
ADAM = ("adam_beta1", "adam_beta2", "adam_eps")  # settings that the optimizer takes from the checkpoint
FLAGS = {"max_lr": "--lr", "min_lr": "--min-lr"}  # by the name of the setting in a parameter group


def find_fault(folder: Path, step: int | None = None) -> str | None:
    """Find out what is wrong with the checkpoint that a run would load.

    Args:
        folder: upstream's --load.
        step: upstream's --ckpt-step.

    Returns:
        A message that names the damaged file and says what to do, or None if no fault is found.
    """
    tracker = folder / TRACKER
    if tracker.is_file():
        content = tracker.read_bytes()
        latest = _iteration_folder(content)
        if latest is None:
            return (
                f"{tracker} holds {content[:40]!r}, not an iteration number: writing it was interrupted, or it was "
                f"changed. {_advice(folder, f'write that number into {tracker.name}')}, or remove {tracker.name} "
                "to train from the beginning."
            )
    elif step:
        latest = None
    else:
        return None
    name = f"iter_{step:07d}" if step else latest
    assert name is not None
    checkpoint = folder / name
    if not checkpoint.is_dir():
        reason = f"--ckpt-step {step} asks for it" if step else f"{tracker.name} names it"
        return f"there is no checkpoint {checkpoint}, but {reason}. {_advice(folder)}."
    fault = _folder_fault(checkpoint)
    return None if fault is None else f"{fault} {_advice(folder, without=checkpoint)}."


def _iteration_folder(content: bytes) -> str | None:
    """Return the name of the checkpoint folder that a tracker file names, or None if the content is not valid."""
    try:
        text = content.decode("utf-8").strip()
        if text == "release":
            return text
        return f"iter_{int(text):07d}" if int(text) >= 0 else None
    except ValueError:
        return None


def _advice(folder: Path, how: str = "", without: Path | None = None) -> str:
    """Name the newest undamaged checkpoint of the folder, leaving out `without`."""
    for checkpoint in sorted(folder.glob("iter_*"), reverse=True):
        number = checkpoint.name.removeprefix("iter_")
        if checkpoint != without and number.isdecimal() and _folder_fault(checkpoint) is None:
            return f"The newest complete checkpoint is {checkpoint.name}: {how or f'give --ckpt-step {int(number)}'}"
    return f"There is no other complete checkpoint in {folder}: give another --load"


def find_file_fault(file: Path) -> str | None:
    """Find out what is wrong with one file of a checkpoint in --ckpt-format torch.

    Returns:
        A message that says what to do, or None if no fault is found.
    """
    fault = _file_fault(file)
    checkpoint = file.parents[1]
    return None if fault is None else f"{fault} {_advice(checkpoint.parent, without=checkpoint)}."


def _file_fault(file: Path) -> str | None:
    """Check that a file of torch.save is complete. It is a zip archive, and the archive's directory is written last."""
    try:
        with file.open("rb") as stream:
            head = stream.read(len(ZIP))
    except OSError as error:
        return f"{file} cannot be read ({error.strerror}): the checkpoint was not finished, or not copied completely."
    if not head:
        return f"{file} is empty: writing it was interrupted, or it was not copied completely."
    if head == ZIP and not zipfile.is_zipfile(file):
        return f"{file} is truncated to {file.stat().st_size:,} bytes."
    return None


def _folder_fault(checkpoint: Path) -> str | None:
    """Find out what is wrong with the files of one checkpoint."""
    ranks = sorted(checkpoint.glob("mp_rank_*"))
    if ranks:
        files = [file for rank in ranks for file in (rank / MODEL_FILE, *sorted(rank.glob("*.pt")))]
        return next(filter(None, map(_file_fault, files)), None)
    about = checkpoint / "metadata.json"
    try:
        json.loads(about.read_text("utf-8"))
    except FileNotFoundError:
        return f"{about} is missing: the checkpoint was not finished, or not copied completely."
    except (OSError, ValueError) as error:
        return f"{about} cannot be read ({error}): the checkpoint was not finished, or not copied completely."
    return (
        _tensor_fault(checkpoint) if (checkpoint / ".metadata").exists() or any(checkpoint.glob("*.distcp")) else None
    )


def _tensor_fault(checkpoint: Path) -> str | None:
    """Compare the sizes of the tensor files with the sizes that the checkpoint's `.metadata` lists."""
    from torch.distributed.checkpoint import FileSystemReader

    listed = checkpoint / ".metadata"
    try:
        parts = FileSystemReader(checkpoint).read_metadata().storage_data.values()
    except FileNotFoundError:
        return f"{listed} is missing: the checkpoint was not finished, or files that begin with a dot were not copied."
    except Exception as error:
        return f"{listed} cannot be read ({error or type(error).__name__}): it is truncated, or was changed."
    ends: dict[str, int] = {}
    for part in parts:
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        try:
            with (checkpoint / name).open("rb") as stream:
                size = stream.seek(0, 2)
        except OSError as error:
            return f"{checkpoint / name} cannot be read ({error.strerror}); it holds tensors of the checkpoint."
        if size < end:
            return f"{checkpoint / name} has {size:,} bytes, but its tensors need {end:,}: it is truncated."
    return None


def explain_group_mismatch(keys: Sequence[str], wanted: Sequence[Any], saved: Sequence[Mapping[str, Any]]) -> str:
    """Explain why a parameter group of this run is not among the saved ones.

    Args:
        keys: names of the settings by which upstream identifies a group.
        wanted: their values in this run.
        saved: the parameter groups of the checkpoint.

    Returns:
        A message that names each setting that differs from the most similar saved group.
    """

    def differing(group: Mapping[str, Any]) -> list[str]:
        pairs = [(key, value, group.get(key, group.get(f"pre_{key}"))) for key, value in zip(keys, wanted, strict=True)]
        return [f"{FLAGS.get(key, key)} is {ours}, was {theirs}" for key, ours, theirs in pairs if ours != theirs]

    nearest = min((differing(group) for group in saved), key=len, default=["the checkpoint has no parameter groups"])
    return (
        f"the optimizer cannot continue from the checkpoint: {'; '.join(nearest)}. Upstream's distributed optimizer "
        "(--use-distributed-optimizer, --paro) identifies the saved parameter groups by these values, even with "
        "--override-opt-param-scheduler. Give the saved values, or --no-load-optim to load the weights only and start "
        "with new optimizer states."
    )


def describe_changed_flags(saved: Namespace, args: Namespace) -> list[str]:
    """Describe flags that differ from those of a checkpoint and that upstream does not compare.

    Args:
        saved: the arguments in the checkpoint.
        args: upstream's arguments of this run, which loads it.

    Returns:
        One line for each flag: its two values, and what follows from the change.
    """
    lines = []
    if not (args.no_load_optim or args.finetune) and args.optimizer == getattr(saved, "optimizer", None) == "adam":
        lines = [
            f"{change}. The optimizer continues with the saved value; give --no-load-optim to start with new optimizer "
            "states"
            for change in _changes(saved, args, ADAM)
        ]
    for change in _changes(saved, args, ("vocab_size", "padded_vocab_size")):
        lines.append(
            f"{change}. Embedding and output layer keep the saved rows that both sizes have; additional rows keep "
            "their initial values"
        )
        break  # the padded size follows from the other one
    return lines


def _changes(saved: Namespace, args: Namespace, names: Sequence[str]) -> list[str]:
    values = [(name, getattr(args, name, None), getattr(saved, name, None)) for name in names]
    return [
        f"--{name.replace('_', '-')} is {ours}, was {theirs}"
        for name, ours, theirs in values
        if None not in (ours, theirs) and ours != theirs
    ]
