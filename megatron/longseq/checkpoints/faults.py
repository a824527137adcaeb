"""Find out what is wrong with the files of a checkpoint, without reading those that hold tensors."""

import json
import zipfile
from pathlib import Path

from megatron.longseq.checkpoints.manifest import find_size_fault, read_manifest
from megatron.longseq.checkpoints.safe_reading import load_metadata

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILE = "model_optim_rng.pt"  # --ckpt-format torch, one per model-parallel rank
COMMON_FILE, COMMON = "common.pt", "common_state"  # arguments and iteration: a file of its own, or an object in others
ZIP = b"PK\x03\x04"  # first bytes of a file written by torch.save


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
        latest = iteration_folder(content)
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
    fault = find_folder_fault(checkpoint)
    return None if fault is None else f"{fault} {_advice(folder, without=checkpoint)}."


def iteration_folder(content: bytes) -> str | None:
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
        if checkpoint != without and number.isdecimal() and find_folder_fault(checkpoint) is None:
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


def find_folder_fault(checkpoint: Path) -> str | None:
    """Find out what is wrong with the files of one checkpoint.

    Args:
        checkpoint: folder of an iteration or a release.

    Returns:
        A message that names the damaged file, or None if no fault is found.
    """
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        return f"{error}."
    if manifest is not None:
        return find_size_fault(checkpoint, manifest)
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


def _is_common(name: str) -> bool:
    return name.partition("/")[0] == COMMON


def _tensor_fault(checkpoint: Path) -> str | None:
    """Compare the sizes of the tensor files with the sizes that the checkpoint's `.metadata` lists."""
    listed = checkpoint / ".metadata"
    try:
        with listed.open("rb") as stream:
            metadata = load_metadata(stream)
        parts = metadata.storage_data.values()
    except FileNotFoundError:
        return f"{listed} is missing: the checkpoint was not finished, or files that begin with a dot were not copied."
    except Exception as error:
        return f"{listed} cannot be read ({error or type(error).__name__}): it is truncated, or was changed."
    if not (checkpoint / COMMON_FILE).exists() and not any(map(_is_common, metadata.state_dict_metadata)):
        return f"{checkpoint / COMMON_FILE} is missing: the checkpoint was not copied completely."
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
