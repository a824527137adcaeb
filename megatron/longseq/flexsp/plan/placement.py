"""Placement of groups on aligned ranks.

A group of degree d begins at a multiple of d. A group that fits into a node does not cross the border of one, because
the cost model counts the links inside a node for it. Powers of two in descending order always fit; together with
degrees such as 3 and 6 some sets of degrees do not, although there are enough ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

DegreeCounts = tuple[tuple[int, int], ...]  # (degree, number of groups), descending


@dataclass(slots=True)
class Placement:
    """Places sets of degrees on the ranks of a domain.

    Attributes:
        ranks: number of ranks N.
        node: ranks of a node.
    """

    ranks: int
    node: int
    _known: dict[DegreeCounts, tuple[int, ...] | None] = field(default_factory=dict, repr=False)
    _slots: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def slots(self, degree: int) -> tuple[int, ...]:
        """Return the first ranks at which a group of a degree may begin."""
        if degree not in self._slots:
            starts = range(0, self.ranks - degree + 1, degree)
            inside = (start for start in starts if start // self.node == (start + degree - 1) // self.node)
            self._slots[degree] = tuple(starts if degree > self.node else inside)
        return self._slots[degree]

    def fits(self, counts: DegreeCounts) -> bool:
        """Return whether groups of these degrees can be placed."""
        sizes = [degree for degree, _ in counts]
        if all(a % b == 0 for a, b in pairwise(sizes)) and all(d > self.node or self.node % d == 0 for d in sizes):
            return sum(degree * count for degree, count in counts) <= self.ranks  # from the left, without a gap
        return self.place(counts) is not None

    def place(self, counts: DegreeCounts) -> tuple[int, ...] | None:
        """Return the first rank of every group, in the order of `counts`; None if no placement was found.

        Degrees that divide one another are placed from the left, in descending order. Otherwise the multiples of three
        are placed from one end and the others from the other end, and then all from the left.

        Args:
            counts: pairs of a degree and the number of its groups, by descending degree.
        """
        if counts not in self._known:
            self._known[counts] = self._place(counts)
        return self._known[counts]

    def _place(self, counts: DegreeCounts) -> tuple[int, ...] | None:
        if sum(degree * count for degree, count in counts) > self.ranks:
            return None
        degrees = [degree for degree, count in counts for _ in range(count)]
        thirds = [degree % 3 == 0 for degree in degrees]
        for reverse in ([False] * len(degrees), thirds, [not third for third in thirds]):
            starts = self._first_fit(degrees, reverse)
            if starts is not None:
                return starts
        return None

    def _first_fit(self, degrees: Sequence[int], reverse: Sequence[bool]) -> tuple[int, ...] | None:
        """Place each group at its first free slot, or at its last one where `reverse` says so."""
        free = bytearray(b"\1") * self.ranks
        slots: dict[tuple[int, bool], list[int]] = {}
        starts = []
        for degree, last in zip(degrees, reverse, strict=True):
            left = slots.get((degree, last))
            if left is None:
                left = slots[degree, last] = list(self.slots(degree) if last else self.slots(degree)[::-1])
            while left:
                start = left.pop()
                if free.find(0, start, start + degree) < 0:
                    break
            else:
                return None
            free[start : start + degree] = bytes(degree)
            starts.append(start)
        return tuple(starts)

    def gaps(self, counts: DegreeCounts) -> list[int]:
        """Return the ranks that a placement leaves without a group, ascending.

        Raises:
            ValueError: The degrees have no placement.
        """
        starts = self.place(counts)
        if starts is None:
            raise ValueError(f"groups of degrees {counts} have no placement on {self.ranks} ranks")
        used = bytearray(self.ranks)
        degrees = [degree for degree, count in counts for _ in range(count)]
        for degree, start in zip(degrees, starts, strict=True):
            used[start : start + degree] = b"\1" * degree
        return [rank for rank in range(self.ranks) if not used[rank]]
