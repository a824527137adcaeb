"""Plans of a step: how many micro-batches, which sequences in each, and which groups work on them.

All planners are deterministic: their searches are limited by counts, so that every rank finds the same plan.
"""

import time
from collections.abc import Iterable, Sequence

from megatron.longseq.flexsp.plan.assign import makespan
from megatron.longseq.flexsp.plan.baselines import sorted_homogeneous, static, total
from megatron.longseq.flexsp.plan.cost import FAMILIES, GroupCostModel, KindFamily
from megatron.longseq.flexsp.plan.degree_sets import lower_estimate
from megatron.longseq.flexsp.plan.exact import EXACT_GAP, solve_exactly
from megatron.longseq.flexsp.plan.fill_holes import Groups, dissolve, fill_holes, sequences
from megatron.longseq.flexsp.plan.microbatch import FINAL, THOROUGH, Effort, plan_microbatch
from megatron.longseq.flexsp.plan.move_cuts import Cuts, QuickPlans, cuts_of, move_cuts
from megatron.longseq.flexsp.plan.plan import PLANNERS, Microbatch, PlannerName, StepPlan
from megatron.longseq.flexsp.plan.problem import PlanError, StepProblem
from megatron.longseq.flexsp.plan.split import Parts, least_microbatches, splits
from megatron.longseq.flexsp.plan.step_bound import step_bound

_COUNTS = 3  # numbers of micro-batches that are tried
_SPLITS = 3  # into each of them, of which the best one and the one that differs most from it are planned
_MOVED_SEQUENCES = 4  # sequences that are planned while cuts are moved, for every sequence of the step
_MOST_MOVED = 16_000  # the same in all, so that large steps do not take long
_BEST_PLANS = 2  # of these, those that are searched thoroughly
_CLOSE = 1.03  # of the seconds of the fastest of them: the others are not searched thoroughly
_FILLED_PLANS = 3  # plans whose holes are filled


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
            found = solve_exactly(
                problem, found, lambda number: len(_padding(problem, number, least, multiple)) * cost.fixed
            )
    microbatches = [problem.microbatch((group.degree, group.held) for group in groups) for groups in found]
    microbatches += _padding(problem, len(microbatches), least if lengths else 0, multiple)
    seconds = sum(one.seconds for one in microbatches)
    bound = step_bound(problem, least, seconds)
    if planner == "exact":
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


def search(
    problem: StepProblem, least: int = 1, multiple: int = 1, known: Sequence[list[Groups]] | None = None
) -> list[Groups]:
    """Return the best plan after hole filling and a last thorough search.

    Args:
        problem: the step.
        least, multiple: see `plan_step`.
        known: plans to begin with; None: `contiguous_plans`.
    """

    def seconds(found: Sequence[Groups]) -> float:
        return _seconds(problem, found, least, multiple)

    found = list(known or contiguous_plans(problem, least, multiple))
    found += [fill_holes(problem, plan, THOROUGH) for plan in sorted(found, key=seconds)[:_FILLED_PLANS]]
    for plan in found[:]:
        fewer = dissolve(problem, plan)
        while fewer is not None:
            found.append(fewer)
            fewer = dissolve(problem, fewer)
    best = min(found, key=seconds)
    last = [_faster_groups(problem, groups, FINAL) for groups in best]
    return min(best, last, fill_holes(problem, last, THOROUGH), key=seconds)


def contiguous_plans(problem: StepProblem, least: int = 1, multiple: int = 1) -> list[list[Groups]]:
    """Return plans of contiguous micro-batches, and the best plans with one degree.

    Args:
        problem: the step.
        least, multiple: see `plan_step`.
    """

    def seconds(found: Sequence[Groups]) -> float:
        return _seconds(problem, found, least, multiple)

    plans = [plan for plan in (sorted_homogeneous(problem), static(problem)) if plan is not None]
    quick = _quick_plans(problem, least, multiple)
    close = _CLOSE * min(map(seconds, quick), default=0.0)
    for plan in quick:
        plans.append([_faster_groups(problem, groups, THOROUGH) for groups in plan] if seconds(plan) <= close else plan)
    return plans


def _quick_plans(problem: StepProblem, least: int, multiple: int) -> list[list[Groups]]:
    """Return quick plans of the best cuts, after they were moved."""
    quick = QuickPlans(problem)

    def seconds(cuts: Cuts) -> float:
        missing = -(-max(len(cuts), least) // multiple) * multiple - len(cuts)
        return quick.seconds(cuts) + missing * problem.cost.fixed

    starts = sorted((cuts_of(parts) for parts in _splits(problem, least, multiple)), key=seconds)
    if not starts:
        return []
    best = starts[0]
    alike = [cuts for cuts in starts[1:] if len(cuts) == len(best)]
    other = [cuts for cuts in starts if len(cuts) != len(best)]
    # The best cuts, the most different ones, and the best ones into another number of micro-batches.
    alike.sort(key=lambda cuts: -_distance(cuts, best))
    chosen = [best, *alike[:1], *other[:1]]
    most = min(_MOVED_SEQUENCES * len(problem.lengths), _MOST_MOVED)
    candidates = [move_cuts(quick, start, most) for start in chosen]
    best_cuts = sorted(dict.fromkeys(candidates), key=seconds)[:_BEST_PLANS]
    # Faster cuts may leave worse holes, so the best ones of the blaster stay.
    return [plan for cuts in dict.fromkeys([*best_cuts, best]) if (plan := quick.plan(cuts)) is not None]


def _faster_groups(problem: StepProblem, groups: Groups, effort: Effort) -> Groups:
    """Return groups for the same sequences that were searched for with some effort, if they are faster."""
    found = plan_microbatch(problem, sequences(problem, groups), effort)
    return found if found is not None and makespan(found) < makespan(groups) else groups


def _splits(problem: StepProblem, least: int, multiple: int) -> list[Parts]:
    """Return two splits for each of several numbers of micro-batches: that with the least estimate, and another one."""
    count = max(least_microbatches(problem), least)
    found: list[Parts] = []
    for number in range(count, count + _COUNTS * multiple):
        if number % multiple == 0 or number == len(problem.lengths):
            each = splits(problem, min(number, len(problem.lengths)))
            each.sort(key=lambda parts: sum(lower_estimate(problem, part) for part in parts))
            found += [
                *each[:1],
                *sorted(each[1:_SPLITS], key=lambda parts: -_distance(cuts_of(parts), cuts_of(each[0])))[:1],
            ]
    return list(dict.fromkeys(found))


def _distance(one: Cuts, other: Cuts) -> int:
    """Return by how many sequences cuts into as many micro-batches differ."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))
