"""Plans of a step: how many micro-batches, which sequences in each, and which groups work on them.

All planners are deterministic: their searches are limited by counts, so that every rank finds the same plan.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from megatron.longseq.flexsp.plan.baselines import sorted_homogeneous, static, total
from megatron.longseq.flexsp.plan.cost import FAMILIES, GroupCostModel, KindFamily
from megatron.longseq.flexsp.plan.degree_sets import lower_estimate
from megatron.longseq.flexsp.plan.exact import EXACT_GAP, solve_exactly
from megatron.longseq.flexsp.plan.fill_holes import Groups, fill_holes
from megatron.longseq.flexsp.plan.microbatch import QUICK, THOROUGH, Effort, plan_microbatch
from megatron.longseq.flexsp.plan.plan import Microbatch, StepPlan
from megatron.longseq.flexsp.plan.problem import PlanError, StepProblem
from megatron.longseq.flexsp.plan.split import Parts, least_microbatches, splits
from megatron.longseq.flexsp.plan.step_bound import step_bound

PlannerName = Literal["heuristic", "exact", "static", "sorted"]
PLANNERS: tuple[PlannerName, ...] = get_args(PlannerName)

_COUNTS = 4  # numbers of micro-batches that are tried above the least
_QUICK_PLANS = 5  # splits that are planned quickly
_BEST_PLANS = 2  # of these, those that are planned thoroughly


def automatic_degrees(ranks: int) -> tuple[int, ...]:
    """Return the degrees of "auto": 1, 2, 4, ... and 3, 6, 12, ... up to the number of ranks."""
    powers = [2**exponent for exponent in range(ranks.bit_length())]
    return tuple(sorted(degree for power in powers for degree in (power, 3 * power) if degree <= ranks))


def plan_step(
    lengths: Sequence[int],
    ranks: int,
    cost: GroupCostModel,
    degrees: Iterable[int] | None = None,
    kinds: Iterable[KindFamily] = FAMILIES,
    planner: PlannerName = "heuristic",
    *,
    least: int = 1,
    multiple: int = 1,
) -> StepPlan:
    """Plan a training step.

    Args:
        lengths: tokens of every sequence.
        ranks: number of data- and context-parallel ranks.
        cost: cost model of a group.
        degrees: degrees that a group may have; those above the number of ranks, or without a legal kind, are left out.
            None: `automatic_degrees`.
        kinds: "ulysses", "ring", "hybrid": how groups may compute attention.
        planner: "heuristic"; "exact", for few sequences; "static", one degree for the step; "sorted", one degree for
            every micro-batch of sequences of similar length.
        least: smallest number of micro-batches, for instance the number of pipeline stages.
        multiple: the number of micro-batches is a multiple of it (virtual stages). Micro-batches without sequences are
            added where there are too few.

    Raises:
        PlanError: No plan exists: a sequence is too long.
        ValueError: An argument is out of range.
    """
    if planner not in PLANNERS:
        raise ValueError(f"planner {planner!r}: give one of {', '.join(PLANNERS)}")
    if least < 1 or multiple < 1:
        raise ValueError(f"at least {least} micro-batches, a multiple of {multiple}: both must be at least 1")
    begin = time.process_time()
    problem = StepProblem(lengths, ranks, cost, automatic_degrees(ranks) if degrees is None else degrees, kinds)
    if not lengths:
        found: list[Groups] = []
    elif planner == "static":
        found = _required(static(problem), problem)
    elif planner == "sorted":
        found = _required(sorted_homogeneous(problem), problem)
    else:
        found = search(problem, least, multiple)
        if planner == "exact":
            found = solve_exactly(problem, found)
    microbatches = [problem.microbatch((group.degree, group.held) for group in groups) for groups in found]
    microbatches += _padding(problem, len(microbatches), least if lengths else 0, multiple)
    seconds = sum(one.seconds for one in microbatches)
    bound = step_bound(problem, least, seconds)
    if planner == "exact" and least == multiple == 1:
        bound = max(bound, seconds * (1 - 2 * EXACT_GAP))
    return StepPlan(tuple(microbatches), seconds, bound, time.process_time() - begin)


def _required(found: list[Groups] | None, problem: StepProblem) -> list[Groups]:
    if found is None:
        raise PlanError(
            f"no degree of {', '.join(map(str, problem.degrees))} alone holds the longest sequence, of "
            f"{max(problem.lengths)} tokens, with {problem.cost.tokens_per_rank} tokens per rank: no plan with one "
            "degree exists. Give more tokens per rank or a larger degree"
        )
    return found


def _padding(problem: StepProblem, count: int, least: int, multiple: int) -> list[Microbatch]:
    """Return micro-batches without sequences that bring their number to `least` and a multiple."""
    wanted = -(-max(count, least) // multiple) * multiple
    return [problem.microbatch([])] * (wanted - count)


def _seconds(problem: StepProblem, found: Sequence[Groups], least: int, multiple: int) -> float:
    return total(found) + len(_padding(problem, len(found), least, multiple)) * problem.cost.fixed


def search(problem: StepProblem, least: int = 1, multiple: int = 1, *, fills: bool = True) -> list[Groups]:
    """Return the best plan of a few splits, or one with a single degree, after hole filling.

    Args:
        problem: the step.
        least, multiple: see `plan_step`.
        fills: whether holes are filled.
    """

    def seconds(found: Sequence[Groups]) -> float:
        return _seconds(problem, found, least, multiple)

    quick = [(parts, plan) for parts in _splits(problem, least, multiple) if (plan := _plan(problem, parts, QUICK))]
    quick.sort(key=lambda one: seconds(one[1]))
    plans = [plan for plan in (sorted_homogeneous(problem), static(problem)) if plan is not None]
    for parts, plan in quick[:_BEST_PLANS]:
        thorough = _plan(problem, parts, THOROUGH)
        plans.append(thorough if thorough is not None and seconds(thorough) < seconds(plan) else plan)
    best = min(plans, key=seconds)
    for plan in sorted(plans, key=seconds)[: _BEST_PLANS if fills else 0]:
        filled = fill_holes(problem, plan, THOROUGH)
        if seconds(filled) < seconds(best):
            best = filled
    return best


def _plan(problem: StepProblem, parts: Parts, effort: Effort) -> list[Groups] | None:
    plan = []
    for part in parts:
        groups = plan_microbatch(problem, part, effort)
        if groups is None:
            return None
        plan.append(groups)
    return plan


def _splits(problem: StepProblem, least: int, multiple: int) -> list[Parts]:
    """Return the splits with the smallest estimates, over several numbers of micro-batches."""
    count = max(least_microbatches(problem), least)
    each = {}
    for number in range(count, count + _COUNTS * multiple):
        if number % multiple == 0 or number == len(problem.lengths):
            for parts in splits(problem, min(number, len(problem.lengths))):
                each[parts] = sum(lower_estimate(problem, part) for part in parts)
    return sorted(each, key=lambda parts: each[parts])[:_QUICK_PLANS]
