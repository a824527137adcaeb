"""Planted errors of the planner: the judge of the planner's tests has to notice each of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron.longseq.flexsp.plan import bound, placement, plan, planner, problem, step_bound
from megatron.longseq.flexsp.plan.baselines import static_plan
from megatron.longseq.flexsp.plan.cost import GroupCostModel
from megatron.longseq.flexsp.plan.problem import StepProblem
from tests.unit.flexsp_bed import COST, check, exhaustive

Plant = Callable[[pytest.MonkeyPatch], None]

LENGTHS = ([20_000, 15_000, 9_000, 8_000, 5_000, 3_000, 700], [20_000, 3_000, 9_000, 700])  # of two steps
RANKS, POWERS = 8, (1, 2, 4, 8)


def dropped_sequence(patch: pytest.MonkeyPatch) -> None:
    """Leave the last sequence of the largest group out."""
    original = StepProblem.microbatch

    def microbatch(self: StepProblem, groups: Any) -> Any:
        groups = [(degree, list(held)) for degree, held in groups]
        if groups:
            max(groups, key=lambda one: len(one[1]))[1].pop()
        return original(self, groups)

    patch.setattr(StepProblem, "microbatch", microbatch)


def ignored_memory(patch: pytest.MonkeyPatch) -> None:
    """Plan with ten times the memory."""
    patch.setattr(GroupCostModel, "capacity", lambda self, degree: 10 * degree * self.tokens_per_rank)


def unaligned_groups(patch: pytest.MonkeyPatch) -> None:
    """Let every group begin one rank later, from right to left."""
    original = placement.Placement.slots
    patch.setattr(placement.Placement, "slots", lambda self, degree: [one + 1 for one in original(self, degree)][:-1])


def mean_of_groups(patch: pytest.MonkeyPatch) -> None:
    """Predict the mean seconds of a micro-batch's groups instead of those of the slowest one."""
    original = StepProblem.microbatch

    def microbatch(self: StepProblem, groups: Any) -> Any:
        one = original(self, groups)
        return replace(one, seconds=sum(group.seconds for group in one.groups) / len(one.groups))

    patch.setattr(StepProblem, "microbatch", microbatch)


def slower_plan(patch: pytest.MonkeyPatch) -> None:
    """Give all sequences to groups of all ranks."""
    patch.setattr(planner, "search", lambda one, *_: static_plan(one, RANKS, 1.0))


def rounded_up_shares(patch: pytest.MonkeyPatch) -> None:
    """Round shares of memory up to halves, which is no dual feasible function."""
    patch.setattr(step_bound, "FEASIBLE", (lambda share: (share * 2).round() / 2 + 0.5 * (share > 0),))
    patch.setattr(step_bound, "microbatch_bound", lambda *_: 0.0)


def counted_idle_ranks(patch: pytest.MonkeyPatch) -> None:
    """Let every rank pay twice for its time."""
    original = step_bound._spent

    def spent(prices: Any, needs: Any, limit: float) -> Any:
        return original(prices, needs, 2 * limit)

    patch.setattr(step_bound, "_spent", spent)


def too_few_microbatches(patch: pytest.MonkeyPatch) -> None:
    """Look only at one micro-batch more than memory needs."""
    original = step_bound.least_microbatches
    patch.setattr(step_bound, "least_microbatches", lambda one: original(one) + 1)


def longest_twice(patch: pytest.MonkeyPatch) -> None:
    """Let a single micro-batch take too long in its own bound."""
    original = bound.microbatch_bound
    patch.setattr(step_bound, "microbatch_bound", lambda *args: 1.2 * original(*args))


PLANTED: tuple[Plant, ...] = (
    dropped_sequence,
    ignored_memory,
    unaligned_groups,
    mean_of_groups,
    slower_plan,
    rounded_up_shares,
    counted_idle_ranks,
    too_few_microbatches,
    longest_twice,
)


def judge(best: dict[int, float]) -> None:
    """Check plans and bounds against the known least seconds."""
    for number, lengths in enumerate(LENGTHS):
        found = planner.plan_step(lengths, RANKS, COST, POWERS)
        check(found, lengths, RANKS)
        assert found.seconds <= 1.01 * best[number]
        one = problem.StepProblem(lengths, RANKS, COST, POWERS)
        for known in (float("inf"), 1.5 * best[number]):
            assert step_bound.step_bound(one, known=known) <= best[number] * (1 + 1e-9)


def test_planted_errors_are_noticed() -> None:
    problems = [StepProblem(lengths, RANKS, COST, POWERS) for lengths in LENGTHS]
    best = {number: exhaustive(one)[0] for number, one in enumerate(problems)}
    judge(best)
    unnoticed = []
    for plant in PLANTED:
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            try:
                judge(best)
            except (AssertionError, problem.PlanError):
                continue
            unnoticed.append(plant.__name__)
    assert not unnoticed


def test_validate_plan_refuses_dropped_sequences_and_unaligned_groups() -> None:
    found = planner.plan_step(LENGTHS[0], RANKS, COST, POWERS)
    with pytest.raises(ValueError, match="not at all"):
        plan.validate_plan(found, [*LENGTHS[0], 5], RANKS)
    with pytest.raises(ValueError, match="once, in order"):
        plan.validate_plan(found, LENGTHS[0], RANKS + 1)
