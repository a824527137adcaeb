"""Save a checkpoint: refuse a state that is not finite, record checksums of the live state, and commit."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron.longseq.checkpoints import commit
from megatron.longseq.checkpoints.digest import first_not_finite
from megatron.longseq.checkpoints.manifest import Item, items_of

REMOVED = "; another run has removed what was written: only one run at a time may save into a folder"


class NonFiniteState(RuntimeError):
    """Parameters or optimizer states are not finite, so they are not saved. All ranks raise this together.

    Args:
        found: what is not finite, for a message with or without advice.
    """

    def __init__(self, found: str) -> None:
        super().__init__(found)
        self.found = found

    def __str__(self) -> str:
        return f"{self.found} Resume from the last one, or give --ckpt-non-finite skip to train on without saving this."


class FolderNotWritten(RuntimeError):
    """A rank could not write into the folder, or the first one not create or rename it. All ranks raise this."""


def save_atomically(
    save: Callable[[str], Any], folder: Path, strategy: Any, group: dist.ProcessGroup, *, in_background: bool
) -> Any:
    """Save a checkpoint in a folder of its own, and commit it once all ranks have written.

    Args:
        save: writes the checkpoint into the folder that it gets, or returns a request that will do so.
        folder: of the finished checkpoint.
        strategy: upstream's save strategy.
        group: of all ranks.
        in_background: whether `save` returns a request. The commit is then the last of the functions that finish it.

    Returns:
        The request, or None.

    Raises:
        NonFiniteState: on all ranks, before anything is written.
        FolderNotWritten: on all ranks, for example if the disk is full.
    """
    _on_first_rank(lambda: commit.begin(folder), folder, group)

    def finish() -> None:
        gathered: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
        dist.gather_object(items, gathered, group=group, group_dst=0)
        found = [item for of_rank in gathered or () for item in of_rank]
        _on_first_rank(lambda: commit.commit(folder, found), folder, group)

    try:
        with _recording(strategy, folder, group, snapshot=in_background) as items:
            request = save(str(commit.saving_folder(folder)))
    except NonFiniteState:
        if group.rank() == 0:
            commit.abandon(folder)
        raise
    if request is None:
        finish()
    else:
        request.add_finalize_fn(finish)
    return request


def _on_first_rank(act: Callable[[], None], folder: Path, group: dist.ProcessGroup) -> None:
    """Change the file system on the first rank. The others wait for it, and raise if it fails."""
    failure: list[str | None] = [None]
    if group.rank() == 0:
        try:
            act()
        except OSError as error:
            is_gone = isinstance(error, FileNotFoundError) and not commit.saving_folder(folder).exists()
            failure = [f"{type(error).__name__}: {error}{REMOVED if is_gone else ''}"]
    dist.broadcast_object_list(failure, group=group, group_src=0)
    if failure[0] is not None:
        raise _not_written(folder, failure[0])


def _not_written(folder: Path, reason: str) -> FolderNotWritten:
    return FolderNotWritten(
        f"{folder} is not saved: {reason}. The checkpoints saved before are unchanged. Make the folder "
        "writable and free space on its disk, then resume from the last one."
    )


@contextmanager
def _recording(strategy: Any, folder: Path, group: dist.ProcessGroup, *, snapshot: bool) -> Iterator[list[Item]]:
    """Record checksums of what the strategy is about to write, at the moment when it has planned the files."""
    inner = getattr(strategy, "base_strategy", strategy)
    items: list[Item] = []
    original = inner.async_save  # upstream's synchronous save calls it too

    def async_save(*args: Any, **named: Any) -> Any:
        request = original(*args, **named)
        buckets = request.async_fn_args[1] if request.async_fn_args else []
        refuse_non_finite(_named_values(buckets), folder, group)
        items.extend(items_of(buckets))
        if snapshot:
            _copy_host_tensors(buckets)
        request.finalize_fns[:] = [_with_reasons(finalize, folder, group) for finalize in request.finalize_fns]
        return request

    inner.async_save = async_save
    try:
        yield items
    finally:
        del inner.async_save


def _with_reasons(finalize: Callable[[], None], folder: Path, group: dist.ProcessGroup) -> Callable[[], None]:
    """Wrap upstream's function that ends a save: every rank raises what any rank could not write.

    Upstream raises a CheckpointException on all ranks. It holds the reasons on the first rank, and nothing on others.
    """

    def finish() -> None:
        try:
            finalize()
        except CheckpointException as error:
            message = [_reasons(error, folder) if group.rank() == 0 else ""]
            dist.broadcast_object_list(message, group=group, group_src=0)
            raise _not_written(folder, message[0]) from error

    return finish


def _reasons(error: CheckpointException, folder: Path) -> str:
    """Return what the ranks could not write. PyTorch's writers call a full disk "unexpected pos"."""
    failures = [f"rank {rank}: {type(one).__name__}: {one}" for rank, (one, _) in error.failures.items()]
    free = shutil.disk_usage(folder.parent).free / 1e9
    removed = "" if commit.saving_folder(folder).exists() else REMOVED
    return "; ".join([*failures, f"the disk of this folder has {free:.1f} GB free{removed}"])


def _named_values(write_buckets: Any) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    for _, _, (_, tensors) in write_buckets:
        for planned, tensor in tensors:
            yield planned.index.fqn, tuple(planned.index.offset or ()), tensor


def _copy_host_tensors(write_buckets: Any) -> None:
    """Replace tensors in host memory by copies: training goes on while another process writes them.

    Upstream copies views, and tensors of a GPU. A tensor of its own in host memory would be shared with the writer.
    """
    for _, _, (_, tensors) in write_buckets:
        for number, (planned, tensor) in enumerate(tensors):
            if tensor.device.type == "cpu":
                tensors[number] = planned, tensor.clone()


def refuse_non_finite(
    values: Iterator[tuple[str, tuple[int, ...], torch.Tensor]], folder: Path, group: dist.ProcessGroup
) -> None:
    """Refuse to save values that are NaN or infinite.

    Args:
        values: of this rank: names, offsets in whole tensors, and data.
        folder: of the checkpoint, for the message.
        group: of all ranks, which decide together.

    Raises:
        NonFiniteState: on all ranks, if a rank has such a value. The message names ranks, parameters and elements.
    """
    mine = []
    for name, offset, tensor in values:
        found = first_not_finite(tensor)
        if found is not None:
            index, value = found
            at = [o + i for o, i in zip(offset, index, strict=True)] if len(offset) == len(index) else list(index)
            mine.append(f"rank {group.rank()}: {name}{at} is {value}")
    faults: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(faults, mine, group=group)
    named = [fault for of_rank in faults for fault in of_rank]
    if named:
        more = f", and {len(named) - 4} more tensors" if len(named) > 4 else ""
        raise NonFiniteState(
            f"{folder} is not saved, because parameters or optimizer states are not finite: {'; '.join(named[:4])}"
            f"{more}. The checkpoints saved before are unchanged."
        )
