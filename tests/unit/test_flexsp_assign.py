"""Sequences join the groups that the rules name: against plain scans over all groups; and micro-batches dissolve."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.longseq.flexsp.plan.assign import WorkGroup, assign, best_fit, makespan
from megatron.longseq.flexsp.plan.fill_holes import dissolve
from megatron.longseq.flexsp.plan.placement import DegreeCounts
from megatron.longseq.flexsp.plan.problem import StepProblem
from tests.unit.flexsp_bed import COST

SETS: tuple[DegreeCounts, ...] = (
    ((8, 1), (4, 1), (2, 1), (1, 2)),
    ((6, 1), (3, 2), (2, 2)),
    ((4, 2), (1, 8)),
    ((1, 16),),
)


def joined(group: WorkGroup, problem: StepProblem, index: int) -> float:
    """Return the seconds of a group with one more sequence; infinite where it does not fit."""
    return group.with_change(problem, index)


def scanned_assign(problem: StepProblem, counts: DegreeCounts, limit: float) -> list[WorkGroup] | None:
    """Return what `assign` promises: every sequence joins the group in which it ends first."""
    groups = [WorkGroup(degree) for degree, count in reversed(counts) for _ in range(count)]
    for index in problem.order:
        best, chosen = limit, None
        for degree, _ in reversed(counts):
            able = [one for one in groups if one.degree == degree and joined(one, problem, index) < inf]
            first = min(able, key=lambda one: one.seconds, default=None)
            if first is not None and joined(first, problem, index) < best:
                best, chosen = joined(first, problem, index), first
        if chosen is None:
            return None
        chosen.add(problem, index)
    return groups


def scanned_fit(problem: StepProblem, counts: DegreeCounts, target: float, by_memory: bool) -> list[WorkGroup] | None:
    """Return what `best_fit` promises: every sequence joins the group that it leaves with the least room."""
    groups = [WorkGroup(degree) for degree, count in reversed(counts) for _ in range(count)]
    for index in problem.order:
        best, chosen = inf, None
        for one in groups:
            if joined(one, problem, index) <= target:
                room = problem.by_degree[one.degree].capacity - one.tokens - one.tokens_of(problem, index)
                share = min(room / problem.by_degree[one.degree].capacity, 1 - joined(one, problem, index) / target)
                key = room if by_memory else share
                if key < best:
                    best, chosen = key, one
        if chosen is None:
            return None
        chosen.add(problem, index)
    return groups


def contents(groups: list[WorkGroup] | None) -> list[tuple[int, list[int], float]] | None:
    return None if groups is None else [(one.degree, one.held, pytest.approx(one.seconds)) for one in groups]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 30_000), min_size=1, max_size=40),
    counts=st.sampled_from(SETS),
    padding=st.sampled_from([None, 1]),
    seconds=st.sampled_from([inf, 2.0, 4.0]),
)
def test_sequences_join_the_groups_that_a_scan_finds(lengths, counts, padding, seconds):
    problem = StepProblem(
        [min(one, 6_000 * counts[0][0]) for one in lengths], 16, replace(COST, padding=padding), range(1, 17)
    )
    assert contents(assign(problem, problem.order, counts, seconds)) == contents(
        scanned_assign(problem, counts, seconds)
    )
    target = 8.0 if seconds == inf else seconds
    for by_memory in (True, False):
        found = best_fit(problem, problem.order, counts, target, by_memory)
        assert contents(found) == contents(scanned_fit(problem, counts, target, by_memory))


def test_a_short_micro_batch_is_dissolved_and_a_full_one_is_not():
    problem = StepProblem([6_000] * 8 + [400] * 8, 8, COST, (1,), ("ulysses",))
    full, short = ([WorkGroup(1) for _ in range(8)] for _ in range(2))
    for number in range(8):
        full[number].add(problem, number)
        short[number].add(problem, 8 + number)
    (one,) = dissolve(problem, [full, short]) or [[]]
    assert sorted(index for group in one for index in group.held) == list(range(16))
    assert all(group.tokens <= COST.tokens_per_rank for group in one)
    assert makespan(one) < makespan(full) + makespan(short)
    tight = StepProblem([6_000] * 8 + [500] * 8, 8, COST, (1,), ("ulysses",))  # one token too many for each rank
    for group in short:
        group.add(problem, group.held[0], -1)
    for number, group in enumerate(short):
        group.add(tight, 8 + number)
    assert dissolve(tight, [full, short]) is None
