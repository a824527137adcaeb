"""The sequence blaster: sequences in order of length, cut into contiguous micro-batches (FlexSP, section 4.2).

Micro-batches of similar lengths need similar degrees. The paper balances their tokens. With memory to spare, fuller
micro-batches at one end leave a smaller one at the other end, which is often faster; `splits` returns those, too.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from megatron.longseq.flexsp.plan.problem import StepProblem

Parts = tuple[tuple[int, ...], ...]  # sequences of every micro-batch, longest first

_FULL = 0.985  # of the memory of all ranks: more cannot be divided among groups
_SHARES = (0.0, 0.5, 1.0)  # of the way from balanced to full micro-batches


def least_microbatches(problem: StepProblem) -> int:
    """Return the smallest number of micro-batches that can hold the tokens of a step."""
    memory = problem.ranks * problem.cost.tokens_per_rank
    return max(1, -(-sum(problem.least_tokens) // memory)) if problem.lengths else 0


def splits(problem: StepProblem, count: int) -> list[Parts]:
    """Return ways to cut the sequences into `count` contiguous micro-batches, the balanced one first.

    None of them has an empty micro-batch, so `count` must not exceed the number of sequences. The list is empty where
    the memory of all ranks does not suffice.

    Args:
        problem: the step.
        count: number of micro-batches.

    Returns:
        For every cut, the sequences of each micro-batch.
    """
    memory = problem.ranks * problem.cost.tokens_per_rank
    order = problem.order
    tokens = [problem.least_tokens[index] for index in order]
    ahead, back = [0, *accumulate(tokens)], [0, *accumulate(tokens[::-1])]
    balanced = _balanced_limit(ahead, count)
    found: dict[Parts, None] = {}
    for share in _SHARES:
        limit = int(balanced + share * max(_FULL * memory - balanced, 0))
        for reverse in (False, True):
            sizes = _cut(back if reverse else ahead, limit, count)
            if sizes is not None and limit <= memory:
                found[tuple(_parts(order, sizes[::-1] if reverse else sizes))] = None
    return list(found)


def _parts(order: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    begin = 0
    for size in sizes:
        yield tuple(order[begin : begin + size])
        begin += size


def _balanced_limit(before: Sequence[int], count: int) -> int:
    """Return the least tokens of the largest of `count` contiguous parts, by bisection."""
    low, high = max(-(-before[-1] // count), *(b - a for a, b in pairwise(before))), before[-1]
    while low < high:
        middle = (low + high) // 2
        if _cut(before, middle, count) is not None:
            high = middle
        else:
            low = middle + 1
    return low


def _cut(before: Sequence[int], limit: int, count: int) -> list[int] | None:
    """Return the sizes of `count` parts, filled one after the other up to a limit; None if they do not suffice.

    Args:
        before: tokens before every sequence, and of all.
        limit: most tokens of a part, at least those of the longest sequence.
        count: number of parts.
    """
    sizes, begin, number = [], 0, len(before) - 1
    for later in range(min(count, number) - 1, -1, -1):
        # Every part that is still to come needs a sequence.
        end = min(bisect_right(before, before[begin] + limit) - 1, number - later)
        sizes.append(end - begin)
        begin = end
    return sizes if begin == number and len(sizes) == count else None
