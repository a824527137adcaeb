"""Blocks of the score matrix, and the few launches of a kernel that compute the blocks of many documents.

A launch computes blocks with the same mask. Its blocks have no row and no key in common, so that their results, and the
gradients of their keys, are written to memory without adding up what one launch returns twice.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from megatron.longseq.attention.plan.ranges import TokenRange

FEW = 2  # so many blocks of a mask are computed one by one, without packing them


@dataclass(frozen=True, slots=True)
class Block:
    """Keys that the queries of a tile see.

    Attributes:
        keys: rows of the buffer of keys.
        causal: the last query sees all keys, and each query before it one key less. Otherwise every query sees all.
        window: as in `Mask`, for blocks that a window cuts; None: the window hides nothing here.
    """

    keys: TokenRange
    causal: bool
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries of some sequences and the blocks of keys that they see.

    Attributes:
        batch: sequences of the batch.
        rows: rows of the buffer of queries.
        blocks: blocks of keys; every query sees at least one key of the first block.
    """

    batch: TokenRange
    rows: TokenRange
    blocks: tuple[Block, ...]


class LaunchBlock(NamedTuple):
    """A block of a launch: rows of queries and of keys of some sequences."""

    batch: TokenRange
    rows: TokenRange
    keys: TokenRange


@dataclass(frozen=True, slots=True)
class Launch:
    """Blocks that one call of a kernel computes.

    Attributes:
        blocks: one block, or several blocks of one sequence each, by sequence with ascending rows and ascending keys.
        causal, window: as in `Block`.
        begins: blocks are the first ones of their tiles. The results of others are merged into theirs.
        is_part: tiles have further blocks, so results are parts of sums.
        memo: what the runtime derives from the launch, such as indices on a device; freed with the launch.
    """

    blocks: tuple[LaunchBlock, ...]
    causal: bool
    window: int | None
    begins: bool
    is_part: bool
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)


class Tiles(tuple[Tile, ...]):
    """Tiles, and the launches that compute them."""

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        """Launches in the order in which they run: those that begin a result come first."""
        kinds: dict[tuple[int, bool, int | None, bool], list[LaunchBlock]] = {}
        for tile in self:
            for number, block in enumerate(tile.blocks):
                kind = (number, block.causal, block.window, len(tile.blocks) > 1)
                kinds.setdefault(kind, []).append(LaunchBlock(tile.batch, tile.rows, block.keys))
        return tuple(
            Launch(blocks, causal, window, number == 0, is_part)
            for (number, causal, window, is_part), all_blocks in sorted(kinds.items(), key=lambda kind: kind[0][0])
            for blocks in _disjoint(all_blocks)
        )


class JoinedTiles(Tiles):
    """Tiles of several plans, computed by the launches of each plan."""

    def __new__(cls, *parts: Tiles) -> "JoinedTiles":
        """Join the tiles of some plans."""
        joined = super().__new__(cls, (tile for part in parts for tile in part))
        joined.parts = parts
        return joined

    parts: tuple[Tiles, ...]

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        """Launches of all plans, in order."""
        return tuple(launch for part in self.parts for launch in part.launches)


def _disjoint(blocks: Sequence[LaunchBlock]) -> Iterable[tuple[LaunchBlock, ...]]:
    """Yield blocks in groups that have no row and no key in common; a few blocks are groups of their own."""
    if len(blocks) <= FEW:
        return ((block,) for block in blocks)
    groups: list[list[LaunchBlock]] = []
    apart = [
        LaunchBlock(TokenRange(sequence, sequence + 1), block.rows, block.keys)
        for block in blocks
        for sequence in range(block.batch.begin, block.batch.end)
    ]
    for block in sorted(apart):
        for group in groups:
            last = group[-1]
            follows = last.rows.end <= block.rows.begin and last.keys.end <= block.keys.begin
            if last.batch != block.batch or follows:
                group.append(block)
                break
        else:
            groups.append([block])
    return (tuple(group) for group in groups)
