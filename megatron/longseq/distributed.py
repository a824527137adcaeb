"""What every system's runtime needs beside process groups: everyone's groups, and a count of what left this rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class SentCounter:
    """What left this rank.

    Attributes:
        bytes: of all messages and collectives, what stays on the rank left out.
        messages: point-to-point messages, or collectives.
    """

    bytes: int = 0
    messages: int = 0

    def count(self, size: int) -> None:
        """Add one message."""
        self.bytes += size
        self.messages += 1


def all_groups(mine: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the ranks of every such group of the job, in the same order on every rank: a collective."""
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, tuple(mine))
    return sorted(set(lists))


def same_backend_options(group: dist.ProcessGroup) -> Any:
    """Return NCCL's options for a group that is to have those of another (upstream's flags set them); else None."""
    if dist.get_backend(group) != "nccl":
        return None
    theirs = group._get_backend(torch.device("cuda")).options
    ours = dist.ProcessGroupNCCL.Options(is_high_priority_stream=theirs.is_high_priority_stream)
    ours.config = theirs.config
    return ours
