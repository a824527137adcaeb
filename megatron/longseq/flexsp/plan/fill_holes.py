"""Hole filling: sequences of one micro-batch move into idle time and free memory of the groups of others.

Contiguous micro-batches leave holes: groups that end before the slowest one. A sequence in a hole costs nothing, and
the micro-batch that it leaves becomes shorter.
"""

from collections.abc import Sequence

from megatron.longseq.flexsp.plan.assign import WorkGroup, makespan
from megatron.longseq.flexsp.plan.microbatch import Effort, plan_microbatch
from megatron.longseq.flexsp.plan.problem import StepProblem

Groups = list[WorkGroup]

_HOLES = 96  # largest holes that a sequence is tried in


def fill_holes(problem: StepProblem, microbatches: Sequence[Groups], effort: Effort) -> list[Groups]:
    """Return micro-batches that take less time, or the given ones.

    The micro-batches give away sequences in turn, the one with the shortest sequences first.

    Args:
        problem: the step.
        microbatches: groups of every micro-batch.
        effort: how long to search for new groups of a micro-batch that gave sequences away.
    """
    current = [list(groups) for groups in microbatches]
    turns = sorted(range(len(current)), key=lambda number: _mean_length(problem, current[number]))
    for number in turns:
        source = current[number]
        others = [_copied(groups) for other, groups in enumerate(current) if other != number]
        held = sorted((index for group in source for index in group.held), key=lambda i: (-problem.lengths[i], i))
        rest = _move(problem, held, others)
        if len(rest) == len(held):
            continue
        replanned = plan_microbatch(problem, rest, effort) if rest else []
        if replanned is not None and makespan(replanned) < makespan(source):
            current = [*others[:number], replanned, *others[number:]]
    return [groups for groups in current if any(group.held for group in groups)]


def _mean_length(problem: StepProblem, groups: Groups) -> float:
    held = [problem.lengths[index] for group in groups for index in group.held]
    return sum(held) / len(held)


def _copied(groups: Groups) -> Groups:
    return [WorkGroup(one.degree, one.seconds, one.tokens, one.squares, list(one.held)) for one in groups]


def _move(problem: StepProblem, held: Sequence[int], others: Sequence[Groups]) -> list[int]:
    """Move sequences into the holes of other micro-batches, where they leave the least room; return the others."""
    holes = []
    for groups in others:
        end = makespan(groups)
        spare = problem.ranks - sum(group.degree for group in groups)
        if spare and 1 in problem.by_degree:  # ranks without a group
            groups += [WorkGroup(1) for _ in range(spare)]
        holes += [(end, group) for group in groups if group.seconds < end * (1 - 1e-9)]
    holes = sorted(holes, key=lambda hole: hole[1].seconds - hole[0])[:_HOLES]
    rest = []
    for index in held:
        best, chosen = float("inf"), None
        for end, group in holes:
            room = end - group.with_change(problem, index)
            if 0 <= room < best:
                best, chosen = room, group
        if chosen is None:
            rest.append(index)
        else:
            chosen.add(problem, index)
    return rest
