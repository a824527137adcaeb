"""Branch and bound equals pricing every leaf, and does less work."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.planner.plan.search import LeafPrice, branch_and_bound
from tests.unit.brute_force import brute_force


@dataclass(frozen=True)
class RandomTree:
    """A tree of three levels; bounds are the exact minima below a node, times a share of at most 1.

    Attributes:
        prices: by first choice, second choice and leaf: seconds and bytes, or None for a choice that is not valid.
        share: of the exact minimum that a bound is.
    """

    prices: list[list[list[tuple[float, float] | None]]]
    share: float

    def roots(self) -> Iterable[tuple[int, ...]]:
        return [(first,) for first in range(len(self.prices))]

    def children(self, node: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        return [(*node, second) for second in range(len(self.prices[node[0]]))] if len(node) == 1 else []

    def leaves(self, node: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        return [(*node, leaf) for leaf in range(len(self.prices[node[0]][node[1]]))] if len(node) == 2 else []

    def family(self, node: tuple[int, ...]) -> int:
        return node[0]

    def _below(self, node: tuple[int, ...]) -> list[tuple[float, float]]:
        rows = self.prices[node[0]] if len(node) == 1 else [self.prices[node[0]][node[1]]]
        return [one for row in rows for one in row if one is not None]

    def node_seconds(self, node: tuple[int, ...]) -> float:
        return self.share * min((seconds for seconds, _ in self._below(node)), default=0.0)

    def node_bytes(self, node: tuple[int, ...]) -> float:
        return self.share * min((size for _, size in self._below(node)), default=0.0)

    def leaf_seconds(self, leaf: tuple[int, ...]) -> float:
        return self.share * (self.prices[leaf[0]][leaf[1]][leaf[2]] or (0.0, 0.0))[0]

    def leaf_bytes(self, leaf: tuple[int, ...]) -> float:
        return self.share * (self.prices[leaf[0]][leaf[1]][leaf[2]] or (0.0, 0.0))[1]

    def price(self, leaf: tuple[int, ...]) -> LeafPrice | None:
        price = self.prices[leaf[0]][leaf[1]][leaf[2]]
        return None if price is None else LeafPrice(*price, preference=tuple(map(float, leaf)))


NUMBERS = st.sampled_from([1.0, 1.00001, 1.001, 2.0, 3.0, 5.0])  # ties, near ties and differences
LEAVES = st.lists(st.none() | st.tuples(NUMBERS, NUMBERS), max_size=4)
TREES = st.builds(RandomTree, st.lists(st.lists(LEAVES, max_size=4), max_size=5), st.sampled_from([0.0, 0.5, 0.9, 1.0]))


@given(TREES, st.sampled_from([0.5, 1.0, 2.5, 9.0]), st.integers(1, 4))
def test_pruning_changes_nothing(tree: RandomTree, limit: float, count: int) -> None:
    everything = brute_force(tree, limit, count)
    found = branch_and_bound(tree, limit, count)
    assert found == everything
    assert found.count.priced <= everything.count.priced


def test_a_bound_that_does_not_hold_is_seen() -> None:
    tree = RandomTree([[[(2.0, 1.0)]], [[(3.0, 1.0), (1.0, 1.0)]]], share=1.0)
    too_high = type("TooHigh", (RandomTree,), {"node_seconds": lambda self, node: 2.5 * node[0]})
    assert branch_and_bound(tree, 9.0).ranked[0][0] == (1, 0, 1)
    assert branch_and_bound(too_high(tree.prices, 1.0), 9.0) != brute_force(tree, 9.0)


def test_branches_that_cannot_win_are_not_priced() -> None:
    fast, slow, large = [[(1.0, 1.0)]], [[(5.0, 1.0)] * 50] * 20, [[(0.5, 99.0)] * 50] * 20
    found = branch_and_bound(RandomTree([slow, large, fast], share=0.9), limit=9.0)
    assert found.ranked[0][1] == LeafPrice(1.0, 1.0, (2.0, 0.0, 0.0))
    assert (found.count.priced, found.count.too_slow, found.count.too_large) == (1, 1, 1)


def test_the_simpler_of_equally_fast_leaves_wins_even_if_it_comes_later() -> None:
    tree = RandomTree([[[(1.00001, 1.0)]], [[(1.0, 1.0)]]], share=1.0)
    assert branch_and_bound(tree, 9.0).ranked[0][0] == (0, 0, 0)


def test_a_search_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="ask for at least 1"):
        branch_and_bound(RandomTree([], 1.0), 9.0, count=0)
