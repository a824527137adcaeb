"""Placement of groups on aligned ranks.

A group of degree d begins at a multiple of d. A group that fits into a node does not cross the border of one, because
the cost model counts the links inside a node for it. Powers of two in descending order always fit; together with
degrees such as 3 and 6 some sets of degrees do not, although there are enough ranks.
"""

from bisect import bisect_left, bisect_right
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
        next_slot: dict[tuple[int, bool], int] = {}
        starts = []
        for degree, last in zip(degrees, reverse, strict=True):
            slots = self.slots(degree)
            at = next_slot.get((degree, last), len(slots) - 1 if last else 0)
            at = last_free(free, slots, degree, at) if last else first_free(free, slots, degree, at)
            if not 0 <= at < len(slots):
                return None
            free[slots[at] : slots[at] + degree] = bytes(degree)
            starts.append(slots[at])
            next_slot[degree, last] = at - 1 if last else at + 1
        return tuple(starts)

    def free(self, counts: DegreeCounts) -> bytearray:
        """Return 1 for every rank that a placement leaves without a group, and 0 for the others.

        Args:
            counts: see `place`.

        Raises:
            ValueError: The degrees have no placement.
        """
        starts = self.place(counts)
        if starts is None:
            raise ValueError(f"groups of degrees {counts} have no placement on {self.ranks} ranks")
        free = bytearray(b"\1") * self.ranks
        degrees = [degree for degree, count in counts for _ in range(count)]
        for degree, start in zip(degrees, starts, strict=True):
            free[start : start + degree] = bytes(degree)
        return free


def first_free(free: bytearray, slots: Sequence[int], degree: int, at: int) -> int:
    """Return the first slot whose ranks are all free, or the number of slots.

    Args:
        free: 1 for every free rank, 0 for the others.
        slots: first ranks at which a group may begin, ascending.
        degree: ranks of the group.
        at: number of the slot to begin with.
    """
    while at < len(slots):
        used = free.find(0, slots[at], slots[at] + degree)
        if used < 0:
            return at
        after = free.find(1, used)  # slots up to the next free rank are left out at once
        at = bisect_left(slots, after, at + 1) if after >= 0 else len(slots)
    return at


def last_free(free: bytearray, slots: Sequence[int], degree: int, at: int) -> int:
    """Return the last slot, from `at` downwards, whose ranks are all free, or -1; see `first_free`."""
    while at >= 0:
        used = free.rfind(0, slots[at], slots[at] + degree)
        if used < 0:
            return at
        before = free.rfind(1, 0, used)
        at = bisect_right(slots, before - degree + 1, 0, at) - 1
    return at
