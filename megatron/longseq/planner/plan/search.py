"""Find the best leaves of a tree of choices by best-first branch and bound.

The search knows nothing about training. A `SearchProblem` names its nodes, gives lower bounds of the seconds and bytes
of every leaf below a node, and prices a leaf. A branch is left out if no leaf below it can fit into the memory, or if
none can be faster than what has been found. So the result is that of pricing every leaf, if the bounds hold.
"""

import heapq
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

_DIGITS = 4  # leaves whose seconds agree to this many digits count as equally fast; the simpler one comes first


@dataclass(frozen=True, slots=True)
class LeafPrice:
    """What a leaf needs.

    Attributes:
        seconds: of a step.
        memory: bytes of the fullest rank, with the reserve.
        preference: orders equally fast leaves: lower is simpler, and comes first.
    """

    seconds: float
    memory: float
    preference: tuple[float, ...] = ()

    @property
    def order(self) -> tuple[float, tuple[float, ...], float, float]:
        """The key by which leaves are ranked.

        Returns:
            Rounded seconds, preference, bytes and exact seconds; the smallest key comes first.
        """
        return rounded(self.seconds), self.preference, self.memory, self.seconds


class SearchProblem[Node: Hashable, Leaf: Hashable](Protocol):
    """A tree of choices. Nodes and leaves are values: equal ones are the same choice."""

    def roots(self) -> Iterable[Node]:
        """Return the nodes of the first level."""
        ...

    def children(self, node: Node) -> Iterable[Node]:
        """Return the next choices below a node; none if the node has leaves."""
        ...

    def leaves(self, node: Node) -> Iterable[Leaf]:
        """Return the leaves directly below a node."""
        ...

    def family(self, node: Node) -> Hashable:
        """Return the part of a node that tells plans apart: of each family only the best leaf is ranked."""
        ...

    def node_bytes(self, node: Node) -> float:
        """Return the bytes that every leaf below a node needs at least."""
        ...

    def node_seconds(self, node: Node) -> float:
        """Return the seconds that every leaf below a node takes at least."""
        ...

    def leaf_bytes(self, leaf: Leaf) -> float:
        """Return the bytes that a leaf needs at least."""
        ...

    def leaf_seconds(self, leaf: Leaf) -> float:
        """Return the seconds that a leaf takes at least."""
        ...

    def price(self, leaf: Leaf) -> LeafPrice | None:
        """Return what a leaf needs; None if it is not valid."""
        ...


@dataclass(slots=True)
class SearchCount:
    """How much work a search was.

    Attributes:
        nodes: nodes whose bound was computed.
        leaves: leaves that were reached.
        priced: leaves that were priced.
        too_slow: nodes and leaves left out because of their seconds.
        too_large: nodes and leaves left out because of their bytes.
    """

    nodes: int = 0
    leaves: int = 0
    priced: int = 0
    too_slow: int = 0
    too_large: int = 0


@dataclass(frozen=True, slots=True)
class SearchResult[Leaf: Hashable]:
    """The best leaves of the best families, best first.

    Attributes:
        ranked: leaves and their prices.
        count: the work of the search.
    """

    ranked: tuple[tuple[Leaf, LeafPrice], ...]
    count: SearchCount = field(default_factory=SearchCount, compare=False)


def rounded(seconds: float) -> float:
    """Return seconds to the digits in which two leaves have to differ to count as faster and slower."""
    return float(f"{seconds:.{_DIGITS}g}")


def branch_and_bound[Node: Hashable, Leaf: Hashable](
    problem: SearchProblem[Node, Leaf], limit: float, count: int = 1
) -> SearchResult[Leaf]:
    """Return the best leaf of each of the best families that fit into the memory.

    Nodes are taken by rising bound of their seconds. The search ends when the next bound exceeds the seconds of the
    last leaf that would be returned.

    Args:
        problem: the tree.
        limit: bytes of a rank.
        count: families to return.
    """
    ranking: _Ranking[Leaf] = _Ranking(count)
    work = SearchCount()
    heap: list[tuple[float, int, Node]] = []

    def push(nodes: Iterable[Node], least: float) -> None:
        for node in nodes:
            work.nodes += 1
            if problem.node_bytes(node) > limit:
                work.too_large += 1
                continue
            seconds = max(problem.node_seconds(node), least)
            if rounded(seconds) > ranking.threshold(problem.family(node)):
                work.too_slow += 1
            else:
                heapq.heappush(heap, (seconds, work.nodes, node))

    push(problem.roots(), 0.0)
    while heap:
        seconds, _, node = heapq.heappop(heap)
        family = problem.family(node)
        if rounded(seconds) > ranking.threshold(family):
            work.too_slow += 1
            continue
        push(problem.children(node), seconds)
        _price_leaves(problem, node, limit, ranking, work)
    return SearchResult(ranking.best(), work)


def _price_leaves[Node: Hashable, Leaf: Hashable](
    problem: SearchProblem[Node, Leaf], node: Node, limit: float, ranking: "_Ranking[Leaf]", work: SearchCount
) -> None:
    """Price the leaves of a node that may enter the ranking, by rising bound of their seconds."""
    family = problem.family(node)
    promising: list[tuple[float, int, Leaf]] = []
    for leaf in problem.leaves(node):
        work.leaves += 1
        if problem.leaf_bytes(leaf) > limit:
            work.too_large += 1
        else:
            promising.append((problem.leaf_seconds(leaf), work.leaves, leaf))
    for seconds, _, leaf in sorted(promising, key=lambda one: one[:2]):
        if rounded(seconds) > ranking.threshold(family):
            work.too_slow += 1
            continue
        work.priced += 1
        price = problem.price(leaf)
        if price is not None and price.memory <= limit:
            ranking.add(family, leaf, price)


class _Ranking[Leaf: Hashable]:
    """The best leaf of every family so far, and the seconds that another leaf must reach to change the result."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a search for {count} plans finds nothing; ask for at least 1")
        self._count = count
        self._best: dict[Hashable, tuple[Leaf, LeafPrice]] = {}
        self._last = float("inf")

    def threshold(self, family: Hashable) -> float:
        """Return the rounded seconds above which a leaf of a family changes nothing."""
        own = self._best.get(family)
        return self._last if own is None else min(self._last, rounded(own[1].seconds))

    def add(self, family: Hashable, leaf: Leaf, price: LeafPrice) -> None:
        """Take a leaf that fits."""
        own = self._best.get(family)
        if own is None or price.order < own[1].order:
            self._best[family] = (leaf, price)
            if len(self._best) >= self._count:
                self._last = heapq.nsmallest(self._count, (one.order for _, one in self._best.values()))[-1][0]

    def best(self) -> tuple[tuple[Leaf, LeafPrice], ...]:
        """Return the result, best first."""
        return tuple(sorted(self._best.values(), key=lambda one: one[1].order)[: self._count])
