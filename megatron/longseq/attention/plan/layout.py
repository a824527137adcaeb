"""Which global token positions a context-parallel rank holds, in which order, before and after the all-to-all.

Upstream cuts a sequence into 2C chunks; context-parallel rank c of C holds chunks c and 2C - 1 - c. That layout of the
data stays. With c = r * U + u, the U ranks of one Ulysses group hold, together, chunks r and 2R - 1 - r of 2R: what the
all-to-all delivers is the ring's zigzag once its halves are put in order (`Layout.arrivals`); no token moves for it.

Where a sequence runs in segments, or documents are laid out one by one, each of them is cut into 2C chunks by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from megatron.longseq.attention.plan.ranges import Spans, union
from megatron.longseq.attention.plan.tiles import Span

Placement = Literal["head-first", "context-first"]


class Place(NamedTuple):
    """Where a context-parallel rank stands: its index in its Ulysses group, and in its ring."""

    ulysses: int
    ring: int


class Arrival(NamedTuple):
    """Tokens that the all-to-all brings: those at `rows` of what the Ulysses rank `source` held before."""

    source: int
    rows: Span


@dataclass(frozen=True, slots=True)
class Mesh:
    """Context-parallel ranks as `ring` Ulysses groups of `ulysses` ranks.

    A *rank* is a context-parallel rank: the index of the pair of chunks that it holds. A *member* is one of the
    processes that upstream puts into the context-parallel group, in ascending order. Head-first they are the same.
    Context-first, neighbouring members are neighbours in a ring, and `ordered` says who is which rank: upstream's
    context-parallel group must be made in that order (`torch.distributed.new_group(..., sort_ranks=False)`), or data
    and rotary positions be cut by rank instead of by the group's own numbering.

    Attributes:
        ulysses: ranks that share the heads, U.
        ring: ranks that share the sequence, R.
        placement: "head-first": the ranks of a Ulysses group are neighbouring members; "context-first": those of a
            ring.

    Raises:
        ValueError: no such mesh.
    """

    ulysses: int
    ring: int
    placement: Placement = "head-first"

    def __post_init__(self) -> None:
        if self.ulysses < 1 or self.ring < 1:
            raise ValueError(f"a mesh of {self.ulysses} x {self.ring} (Ulysses x ring) ranks: each needs at least 1")
        if self.placement not in get_args(Placement):
            raise ValueError(f"context-parallel placement {self.placement!r}: give {' or '.join(get_args(Placement))}")

    @property
    def size(self) -> int:
        """Context-parallel ranks C."""
        return self.ulysses * self.ring

    def place(self, rank: int) -> Place:
        """Return where a rank stands."""
        return Place(rank % self.ulysses, rank // self.ulysses)

    def rank(self, member: int) -> int:
        """Return which rank a member is.

        Raises:
            ValueError: no such member.
        """
        if not 0 <= member < self.size:
            raise ValueError(f"member {member} of a context-parallel group of {self.size}")
        if self.placement == "head-first":
            return member
        return member % self.ring * self.ulysses + member // self.ring

    def ordered(self, members: Sequence[int]) -> tuple[int, ...]:
        """Return the members (global ranks, ascending) by rank.

        Raises:
            ValueError: not as many members as ranks, or not in ascending order.
        """
        if len(members) != self.size or list(members) != sorted(set(members)):
            raise ValueError(
                f"context-parallel group {list(members)}: a mesh of {self.ulysses} x {self.ring} (Ulysses x ring) "
                f"needs {self.size} global ranks in ascending order"
            )
        by_rank = {self.rank(index): member for index, member in enumerate(members)}
        return tuple(by_rank[rank] for rank in range(self.size))

    def ulysses_groups(self, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the Ulysses group of every ring index, as global ranks in Ulysses order, which is ascending."""
        ranks = self.ordered(members)
        return tuple(ranks[ring * self.ulysses : (ring + 1) * self.ulysses] for ring in range(self.ring))

    def ring_groups(self, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the ring of every Ulysses index, as global ranks in ring order, which is ascending."""
        ranks = self.ordered(members)
        return tuple(ranks[ulysses :: self.ulysses] for ulysses in range(self.ulysses))


def length_multiple(size: int, tensor: int = 1) -> int:
    """Return what a segment's tokens must be a multiple of.

    Args:
        size: context-parallel ranks: each holds two chunks of the same length.
        tensor: tensor-parallel ranks that share a rank's tokens under --sequence-parallel, else 1.
    """
    return size * math.lcm(2, tensor) if size > 1 else tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Tokens of a sequence on the ranks of a mesh.

    Attributes:
        mesh: the ranks.
        lengths: tokens of every segment, in order: those of Seq1F1B, computed one after another; or the (padded)
            documents of upstream's per-document split, computed together; or one, the whole sequence.
        tensor: tensor-parallel ranks that share a rank's tokens under --sequence-parallel, else 1.

    Raises:
        ValueError: no segment, or one that does not divide.
    """

    mesh: Mesh
    lengths: tuple[int, ...]
    tensor: int = 1

    def __post_init__(self) -> None:
        multiple = length_multiple(self.mesh.size, self.tensor)
        wrong = [(index, length) for index, length in enumerate(self.lengths) if length < 1 or length % multiple]
        if wrong or not self.lengths:
            index, length = wrong[0] if wrong else (0, 0)
            shared = f" and their tokens over {self.tensor} tensor-parallel ranks" if self.tensor > 1 else ""
            raise ValueError(
                f"segment {index} of {len(self.lengths)} has {length} tokens: it is cut into 2 chunks for each of "
                f"{self.mesh.size} context-parallel ranks{shared}, so give multiples of {multiple}, for instance "
                f"{max(multiple, -(-length // multiple) * multiple)}"
            )

    def begin(self, segment: int) -> int:
        """Return the position of a segment's first token."""
        return sum(self.lengths[:segment])

    def tokens(self, segment: int) -> int:
        """Return how many of a segment's tokens a rank holds."""
        return self.lengths[segment] // self.mesh.size

    def positions(self, rank: int, segment: int) -> tuple[Span, Span]:
        """Return the positions of a segment that a rank holds, in its order: upstream's layout of the data.

        Raises:
            ValueError: no such rank.
        """
        return self._pair(rank, self.mesh.size, segment)

    def ring_positions(self, ring: int, segment: int) -> tuple[Span, Span]:
        """Return the positions of a segment that each rank of a Ulysses group holds after the all-to-all, in order.

        Raises:
            ValueError: no such index in the ring.
        """
        return self._pair(ring, self.mesh.ring, segment)

    def shard(self, ring: int, segments: range) -> Spans:
        """Return the positions of some segments at a ring index: what its buffer of keys holds, in its order."""
        return union(span for segment in segments for span in self.ring_positions(ring, segment))

    def shards(self, segments: range) -> tuple[Spans, ...]:
        """Return `shard` of every ring index."""
        return tuple(self.shard(ring, segments) for ring in range(self.mesh.ring))

    def arrivals(self, segments: range) -> tuple[Arrival, ...]:
        """Return what the all-to-all of some segments brings, in the order of `ring_positions`; alike on all ranks.

        Rank u's first halves come in the order of u, then its second halves against it: received as
        [U, 2, chunk, ...] of one segment, unpacked as [2, U, chunk, ...] with the second half flipped over U. The way
        back takes the same list: those rows, in this order, go to `rows` of `source`.
        """
        ranks = range(self.mesh.ulysses)
        arrivals, offset = [], 0
        for segment in segments:
            chunk = self.tokens(segment) // 2
            first, second = Span(offset, offset + chunk), Span(offset + chunk, offset + self.tokens(segment))
            arrivals += [Arrival(rank, first) for rank in ranks] + [Arrival(rank, second) for rank in reversed(ranks)]
            offset = second.end
        return tuple(arrivals)

    def gathered(self, segments: range) -> tuple[Arrival, ...]:
        """Return where an all-gather over the ring has some segments' tokens, by position; `source` is a ring index."""
        arrivals: list[tuple[Span, Arrival]] = []
        sizes = [self.lengths[segment] // self.mesh.ring for segment in segments]
        offsets = accumulate(sizes, initial=0)
        for segment, offset in zip(segments, offsets, strict=False):
            for ring in range(self.mesh.ring):
                at = offset
                for span in self.ring_positions(ring, segment):
                    arrivals.append((span, Arrival(ring, Span(at, at + span.size))))
                    at += span.size
        return tuple(arrival for _, arrival in sorted(arrivals))

    def _pair(self, index: int, size: int, segment: int) -> tuple[Span, Span]:
        """Return chunks `index` and `2 * size - 1 - index` of 2 * size of a segment."""
        if not 0 <= index < size:
            raise ValueError(f"rank {index} of {size}: count from 0 to {size - 1}")
        begin, length = self.begin(segment), self.lengths[segment]
        first, second = index, 2 * size - 1 - index
        return (
            Span(begin + first * length // (2 * size), begin + (first + 1) * length // (2 * size)),
            Span(begin + second * length // (2 * size), begin + (second + 1) * length // (2 * size)),
        )
