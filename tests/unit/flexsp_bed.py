"""A judge of FlexSP's plans that knows the cost model, but none of the planner's code, and an exhaustive search."""

from functools import lru_cache
from math import inf

import pytest

from megatron.longseq.flexsp.plan.paper import paper_cost
from megatron.longseq.flexsp.plan.plan import StepPlan
from megatron.longseq.flexsp.plan.problem import StepProblem

COST = paper_cost("7b")


def exhaustive(problem: StepProblem) -> tuple[float, float]:
    """Return the least seconds of a step, and of one micro-batch, over all partitions into micro-batches and groups."""
    number = len(problem.lengths)
    times: dict[tuple[int, int], float] = {}
    for degree, each in problem.by_degree.items():
        for chosen in range(1, 1 << number):
            held = [problem.lengths[index] for index in range(number) if chosen >> index & 1]
            kinds = problem.cost.kinds(degree) if len(each.kinds) > 1 else [one.kind for one in each.kinds]
            fits = sum(held) <= degree * problem.cost.tokens_per_rank
            times[degree, chosen] = min(problem.cost.seconds(kind, held) for kind in kinds) if fits else inf

    def parts(whole: int) -> list[int]:
        """Return the parts of a set that hold its first sequence."""
        first, found = whole & -whole, []
        rest = part = whole ^ first
        while True:
            found.append(part | first)
            if not part:
                return found
            part = (part - 1) & rest

    @lru_cache(None)
    def microbatch(whole: int, ranks: int) -> float:
        if not whole:
            return 0.0
        return min(
            (
                max(times[degree, part], microbatch(whole ^ part, ranks - degree))
                for part in parts(whole)
                for degree in problem.degrees
                if degree <= ranks
            ),
            default=inf,
        )

    @lru_cache(None)
    def step(whole: int) -> float:
        return min(microbatch(part, problem.ranks) + step(whole ^ part) for part in parts(whole)) if whole else 0.0

    everything = (1 << number) - 1
    return step(everything), microbatch(everything, problem.ranks)


def check(plan: StepPlan, lengths: list[int], ranks: int, tokens_per_rank: int = COST.tokens_per_rank) -> None:
    """Check sequences, ranks, memory, seconds and nodes of a plan, from the cost model alone."""
    planned = [index for one in plan.microbatches for group in one.groups for index in group.sequences]
    assert sorted(planned) == list(range(len(lengths)))
    for one in plan.microbatches:
        assert [rank for group in one.groups for rank in group.ranks] == list(range(ranks))
        for group in one.groups:
            assert len(group.ranks) == group.degree and group.ranks[0] % group.degree == 0
            held = [lengths[index] for index in group.sequences]
            assert sum(held) <= group.degree * tokens_per_rank
            assert group.seconds == pytest.approx(COST.seconds(group.kind, held))
            assert group.degree > COST.links.node or group.ranks[0] // 8 == group.ranks[-1] // 8
        assert one.seconds == pytest.approx(max(group.seconds for group in one.groups) or COST.fixed)
    assert plan.seconds == pytest.approx(sum(one.seconds for one in plan.microbatches))
    assert plan.bound <= plan.seconds
