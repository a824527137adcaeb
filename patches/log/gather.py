"""Collect what each rank knows about a logged step, in one collective."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RankFigures:
    """What the ranks have said.

    Attributes:
        peaks: peak of allocated memory in bytes, by global rank.
        unused_bytes: reserved memory beyond that peak, of the rank with the most.
        learning_rate: of the ranks that train a parameter; None if no rank does.
        bubble: mean over the pipelines that were measured; None without any.
    """

    peaks: list[float]
    unused_bytes: int
    learning_rate: float | None = None
    bubble: float | None = None


def table_of(own: list[float], group: Any) -> list[list[float]]:
    """Return the columns of a table with a row of every rank of a group.

    Args:
        own: this rank's row.
        group: a process group; None: all ranks. Every rank of it must call this at the same time.
    """
    import torch

    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    table = torch.zeros(size, len(own), dtype=torch.float64, device="cuda")
    table[rank] = torch.tensor(own, dtype=torch.float64)
    torch.distributed.all_reduce(table, group=group)  # one message; a gather would take one of each rank
    columns: list[list[float]] = table.T.tolist()
    return columns


def gather(learning_rate: float | None = None, bubble: float = math.nan) -> RankFigures:
    """Gather the figures of all ranks. Every rank must call this at the same time.

    Args:
        learning_rate: of this rank's parameters; None if it trains none.
        bubble: of this rank's pipeline; NaN if it was not measured.
    """
    import torch

    peak = torch.cuda.max_memory_allocated()
    unused = torch.cuda.max_memory_reserved() - peak
    rate = math.nan if learning_rate is None else learning_rate
    peaks, beyond, rates, bubbles = table_of([peak, unused, rate, bubble], None)
    rates = [value for value in rates if not math.isnan(value)]
    bubbles = [value for value in bubbles if not math.isnan(value)]
    return RankFigures(
        peaks=peaks,
        unused_bytes=int(max(beyond)),
        learning_rate=max(rates, default=None),
        bubble=sum(bubbles) / len(bubbles) if bubbles else None,
    )
