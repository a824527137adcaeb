"""Which token positions a context-parallel rank holds, in which order, before and after the all-to-all of Ulysses.

Upstream cuts a sequence into 2C chunks; context-parallel rank c of C holds chunks c and 2C - 1 - c (zigzag). With
c = r * U + u, the U ranks of a Ulysses group hold chunks r and 2R - 1 - r of 2R together, in the same zigzag. The
all-to-all therefore delivers the ring's layout once its second halves are reordered (`Layout.received_rows`).

A sequence that runs in segments is cut segment by segment: each segment into 2C chunks. Where a ring's work is better
shared out by documents, a segment is cut into pieces first, and each piece into 2C chunks (`plan.layout_choice`); with
documents padded to 2C tokens, one piece for each, this is TransformerEngine's layout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, get_args

from megatron.longseq.attention.plan.ranges import TokenRange, TokenRanges, union

Placement = Literal["head-first", "context-first"]


Pieces = tuple[tuple[int, ...], ...]  # tokens of the pieces of every segment


class Coordinates(NamedTuple):
    """Coordinates of a context-parallel rank: index in its Ulysses group, and in its ring."""

    ulysses: int
    ring: int


class ReceivedRows(NamedTuple):
    """Rows received from one rank: those at `rows` of what `source` held before."""

    source: int
    rows: TokenRange


class RowOrder(tuple[ReceivedRows, ...]):
    """Received rows in their new order. Its hash is computed once, because indices are cached by it."""

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        """Return the hash of the rows."""
        return self._hash


@dataclass(frozen=True, slots=True)
class Mesh:
    """Context-parallel ranks as `ring` Ulysses groups of `ulysses` ranks; rank c is at (c % U, c // U).

    Head-first, context-parallel ranks are in the order of global ranks, as in upstream's group. Context-first, the
    ranks of a ring are neighbours instead: upstream's context-parallel group is then made again in the order that
    `ordered` returns (`torch.distributed.new_group(..., sort_ranks=False)`).

    Attributes:
        ulysses: ranks that share the heads, U.
        ring: ranks that share the sequence, R.
        placement: "head-first": the ranks of a Ulysses group have neighbouring global ranks; "context-first": those of
            a ring.

    Raises:
        ValueError: A size is below 1, or the placement is unknown.
    """

    ulysses: int
    ring: int
    placement: Placement = "head-first"

    def __post_init__(self) -> None:
        if self.ulysses < 1 or self.ring < 1:
            raise ValueError(f"mesh of {self.ulysses} x {self.ring} (Ulysses x ring) ranks: both must be at least 1")
        if self.placement not in get_args(Placement):
            raise ValueError(f"context-parallel placement {self.placement!r}: give {' or '.join(get_args(Placement))}")

    @property
    def size(self) -> int:
        """Number of context-parallel ranks C."""
        return self.ulysses * self.ring

    def place(self, rank: int) -> Coordinates:
        """Return the coordinates of a context-parallel rank."""
        return Coordinates(rank % self.ulysses, rank // self.ulysses)

    def ordered(self, members: Sequence[int]) -> tuple[int, ...]:
        """Return the global ranks of a context-parallel group in the order of context-parallel ranks.

        Args:
            members: global ranks, ascending.

        Raises:
            ValueError: The number of members is not the mesh's size, or they are not in ascending order.
        """
        if len(members) != self.size or list(members) != sorted(set(members)):
            raise ValueError(
                f"context-parallel group {list(members)}: a mesh of {self.ulysses} x {self.ring} (Ulysses x ring) "
                f"needs {self.size} global ranks in ascending order"
            )
        if self.placement == "head-first":
            return tuple(members)
        return tuple(
            members[ulysses * self.ring + ring] for ring in range(self.ring) for ulysses in range(self.ulysses)
        )

    def ulysses_groups(self, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the Ulysses group of every ring index, from global ranks as `ordered` returns them."""
        return [tuple(ranks[ring * self.ulysses : (ring + 1) * self.ulysses]) for ring in range(self.ring)]

    def ring_groups(self, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the ring of every Ulysses index, from global ranks as `ordered` returns them."""
        return [tuple(ranks[ulysses :: self.ulysses]) for ulysses in range(self.ulysses)]


def length_multiple(size: int, tensor: int = 1) -> int:
    """Return the number that the tokens of a segment must be a multiple of.

    Args:
        size: context-parallel ranks; each holds two chunks of the same length.
        tensor: tensor-parallel ranks that share a rank's tokens under --sequence-parallel, else 1.
    """
    return size * math.lcm(2, tensor) if size > 1 else tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Token positions of a sequence on the ranks of a mesh.

    Attributes:
        mesh: the ranks.
        lengths: tokens of every segment (--seq1f1b-splits), in order; one length for a sequence without segments.
        tensor: tensor-parallel ranks that share a rank's tokens under --sequence-parallel, else 1.
        pieces: tokens of the pieces of every segment, in order; None: each segment is one piece.

    Raises:
        ValueError: There is no segment, the length of one does not divide, or pieces do not fill their segment.
    """

    mesh: Mesh
    lengths: tuple[int, ...]
    tensor: int = 1
    pieces: Pieces | None = None

    def __post_init__(self) -> None:
        multiple = length_multiple(self.mesh.size, self.tensor)
        wrong = [(index, length) for index, length in enumerate(self.lengths) if length < 1 or length % multiple]
        if wrong or not self.lengths:
            index, length = wrong[0] if wrong else (0, 0)
            shared = f" and their tokens over {self.tensor} tensor-parallel ranks" if self.tensor > 1 else ""
            raise ValueError(
                f"segment {index} of {len(self.lengths)} has {length} tokens: it is cut into 2 chunks per "
                f"context-parallel rank, of {self.mesh.size} ranks{shared}; give a multiple of {multiple}, for "
                f"instance {max(multiple, -(-length // multiple) * multiple)}"
            )
        if self.pieces is not None:
            self._check_pieces(self.pieces)

    def _check_pieces(self, pieces: Pieces) -> None:
        multiple = 2 * self.mesh.size
        if tuple(sum(each) for each in pieces) != self.lengths:
            raise ValueError(
                f"pieces of {[sum(each) for each in pieces]} tokens for segments of {list(self.lengths)}: give the "
                "pieces of every segment, without gaps"
            )
        wrong = [length for each in pieces for length in each if length < 1 or length % multiple]
        if wrong:
            raise ValueError(
                f"a piece of {wrong[0]} tokens: it is cut into 2 chunks for each of {self.mesh.size} context-parallel "
                f"ranks, so give multiples of {multiple}"
            )

    def begin(self, segment: int) -> int:
        """Return the position of a segment's first token."""
        return sum(self.lengths[:segment])

    def tokens(self, segment: int) -> int:
        """Return the number of a segment's tokens on a rank."""
        return self.lengths[segment] // self.mesh.size

    def positions(self, rank: int, segment: int) -> tuple[TokenRange, ...]:
        """Return the positions of a segment that a rank holds before the all-to-all, in order: two ranges a piece.

        With one piece this is upstream's layout.

        Args:
            rank: context-parallel rank, from 0.
            segment: index of the segment, from 0.

        Raises:
            ValueError: There is no such rank.
        """
        return self._chunks(rank, self.mesh.size, segment)

    def ring_positions(self, ring: int, segment: int) -> tuple[TokenRange, ...]:
        """Return the positions of a segment that each rank of a Ulysses group holds after the all-to-all, in order.

        Args:
            ring: ring index, from 0.
            segment: index of the segment, from 0.

        Raises:
            ValueError: There is no such ring index.
        """
        return self._chunks(ring, self.mesh.ring, segment)

    def shard(self, ring: int, segments: range) -> TokenRanges:
        """Return the positions of some segments at a ring index, in the order of its buffer of keys.

        Args:
            ring: ring index, from 0.
            segments: indices of the segments.
        """
        return union(span for segment in segments for span in self.ring_positions(ring, segment))

    def shards(self, segments: range) -> tuple[TokenRanges, ...]:
        """Return `shard` of every ring index.

        Args:
            segments: indices of the segments.
        """
        return tuple(self.shard(ring, segments) for ring in range(self.mesh.ring))

    def received_rows(self, segments: range) -> RowOrder:
        """Return the rows that the all-to-all of some segments delivers, in the order of `ring_positions`.

        The list is the same on all ranks. Of each piece, the first halves of ranks 0 to U - 1 are followed by the
        second halves of ranks U - 1 to 0: what is received as [U, 2, chunk, ...] becomes [2, U, chunk, ...], with the
        second half flipped over U. The way back uses the same list.
        """
        return _received_rows(self, segments)

    def all_gather_order(self, segments: range) -> RowOrder:
        """Return the rows that an all-gather over the ring delivers of some segments, in order of position.

        `ReceivedRows.source` is a ring index here.
        """
        return _all_gather_order(self, segments)

    def pieces_of(self, segment: int) -> tuple[int, ...]:
        """Return the tokens of every piece of a segment."""
        return (self.lengths[segment],) if self.pieces is None else self.pieces[segment]

    def _chunks(self, index: int, size: int, segment: int) -> tuple[TokenRange, ...]:
        """Return chunks `index` and `2 * size - 1 - index` of the 2 * size chunks of every piece of a segment."""
        if not 0 <= index < size:
            raise ValueError(f"rank {index} is not in a group of {size}; give 0 to {size - 1}")
        begin, chunks = self.begin(segment), []
        for length in self.pieces_of(segment):
            chunks += [
                TokenRange(begin + number * length // (2 * size), begin + (number + 1) * length // (2 * size))
                for number in (index, 2 * size - 1 - index)
            ]
            begin += length
        return tuple(chunks)


@lru_cache(maxsize=32)
def _received_rows(layout: Layout, segments: range) -> RowOrder:
    ranks = range(layout.mesh.ulysses)
    received: list[ReceivedRows] = []
    offset = 0
    for length in (length for segment in segments for length in layout.pieces_of(segment)):
        border, end = offset + length // (2 * layout.mesh.size), offset + length // layout.mesh.size
        first, second = TokenRange(offset, border), TokenRange(border, end)
        received += [ReceivedRows(rank, first) for rank in ranks]
        received += [ReceivedRows(rank, second) for rank in reversed(ranks)]
        offset = end
    return RowOrder(received)


@lru_cache(maxsize=32)
def _all_gather_order(layout: Layout, segments: range) -> RowOrder:
    received: list[tuple[TokenRange, ReceivedRows]] = []
    for ring in range(layout.mesh.ring):
        at = 0
        for span in (span for segment in segments for span in layout.ring_positions(ring, segment)):
            received.append((span, ReceivedRows(ring, TokenRange(at, at + span.size))))
            at += span.size
    return RowOrder(rows for _, rows in sorted(received))
