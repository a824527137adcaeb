"""The planner's search without bounds: every leaf is priced."""

from collections.abc import Hashable

from megatron.longseq.planner.plan.search import LeafPrice, SearchCount, SearchProblem, SearchResult


def brute_force[Node: Hashable, Leaf: Hashable](
    problem: SearchProblem[Node, Leaf], limit: float, count: int = 1
) -> SearchResult[Leaf]:
    """Return the best leaf that fits of every family, for the `count` best families."""
    best: dict[Hashable, tuple[Leaf, LeafPrice]] = {}
    work, stack = SearchCount(), list(problem.roots())
    while stack:
        node = stack.pop()
        stack += problem.children(node)
        for leaf in problem.leaves(node):
            work.priced += 1
            price, family = problem.price(leaf), problem.family(node)
            fits = price is not None and price.memory <= limit
            if fits and (family not in best or price.order < best[family][1].order):
                best[family] = leaf, price
    return SearchResult(tuple(sorted(best.values(), key=lambda one: one[1].order)[:count]), work)
