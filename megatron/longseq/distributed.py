"""Helpers for process groups that the runtimes of all systems share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class SentCounter:
    """Count the bytes and messages that this rank has sent.

    Attributes:
        bytes: payload of all messages and collectives. Data that stays on the rank is not counted.
        messages: number of point-to-point messages or collectives.
    """

    bytes: int = 0
    messages: int = 0

    def count(self, size: int) -> None:
        """Add one message of `size` bytes."""
        self.bytes += size
        self.messages += 1


def all_groups(mine: Sequence[int]) -> list[tuple[int, ...]]:
    """Collect the groups that all ranks of the job belong to. This is a collective over the whole job.

    Args:
        mine: global ranks of the group that this rank belongs to.

    Returns:
        The ranks of every group, each group once, in the same order on every rank.
    """
    if dist.get_backend() == "fake":
        return translated_groups(mine, dist.get_world_size())
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, tuple(mine))
    return sorted(set(lists))


def translated_groups(mine: Sequence[int], ranks: int) -> list[tuple[int, ...]]:
    """Return the groups that divide all ranks of a job as one group does, in a dry run, where no rank can be asked.

    The groups of upstream's grid of ranks differ from one another by a constant. So every group begins with the
    smallest rank that is in no group before it.

    Args:
        mine: global ranks of one group, ascending.
        ranks: ranks of the job.

    Raises:
        ValueError: groups of this form do not divide the ranks.
    """
    offsets = [rank - mine[0] for rank in mine]
    groups: list[tuple[int, ...]] = []
    left = dict.fromkeys(range(ranks))
    while left:
        first = next(iter(left))
        group = tuple(first + offset for offset in offsets)
        if any(rank not in left for rank in group):
            raise ValueError(f"{ranks} ranks cannot be divided into groups of the form of {list(mine)}")
        for rank in group:
            del left[rank]
        groups.append(group)
    if tuple(mine) not in groups:
        raise ValueError(f"{ranks} ranks cannot be divided into groups of the form of {list(mine)}")
    return groups


def same_backend_options(group: dist.ProcessGroup) -> Any:
    """Return options with which a new group behaves as an existing one.

    Upstream's flags set NCCL options such as the stream priority on its own groups. Groups that this project creates
    take the same ones.

    Args:
        group: the existing group.

    Returns:
        NCCL options, or None for any other backend.
    """
    if dist.get_backend(group) != "nccl":
        return None
    existing = group._get_backend(torch.device("cuda")).options
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=existing.is_high_priority_stream)
    options.config = existing.config
    return options


def new_groups(
    rank_lists: Iterable[Sequence[int]], like: dist.ProcessGroup, timeout: timedelta | None = None, **options: Any
) -> dist.ProcessGroup:
    """Create a process group for every list of ranks, and return this rank's. This is a collective over the whole job.

    torch requires that every rank of the job creates every group, in the same order.

    Args:
        rank_lists: global ranks of the groups; every rank of the job is in one of them.
        like: a group with the backend and the options of the new ones.
        timeout: after which an unfinished message is an error; None: the backend's default.
        **options: further arguments of `torch.distributed.new_group`.
    """
    own = None
    for ranks in rank_lists:
        group = dist.new_group(list(ranks), timeout, dist.get_backend(like), same_backend_options(like), **options)
        if dist.get_rank() in ranks:
            own = group
    assert own is not None, "this rank is in one of the lists"
    return own
