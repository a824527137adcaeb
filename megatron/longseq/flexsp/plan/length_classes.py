"""Classes of sequences of similar lengths, which programs count instead of single sequences."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.flexsp.plan.problem import StepProblem

_BISECTIONS = 24


def length_classes(
    problem: StepProblem, indices: Sequence[int], most: int
) -> tuple[list[int], NDArray[np.float64], list[list[int]]]:
    """Divide sequences into classes of neighbouring lengths.

    Sequences of one length are in one class. Where that makes too many classes, neighbours are merged so that each
    class differs from its shortest sequence by about the same number of tokens in all. So the few long sequences stay
    apart.

    Args:
        problem: the step.
        indices: sequences.
        most: largest number of classes.

    Returns:
        The shortest sequence of each class, the number of sequences of each, and the sequences of each.
    """
    order = sorted(indices, key=lambda index: (problem.lengths[index], index))
    equal = [list(members) for _, members in groupby(order, key=lambda index: problem.lengths[index])]
    low, high = 0.0, float(sum(problem.lengths[index] for index in order))
    classes = equal
    if len(equal) > most:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            merged = _merge(problem, equal, middle)
            low, high = (low, middle) if len(merged) <= most else (middle, high)
        classes = _merge(problem, equal, high)
    counts = np.array([len(members) for members in classes], dtype=np.float64)
    return [members[0] for members in classes], counts, classes


def _merge(problem: StepProblem, equal: Sequence[list[int]], most_lost: float) -> list[list[int]]:
    """Merge neighbours as long as a class differs from its shortest sequence by at most that many tokens in all."""
    merged: list[list[int]] = []
    first, lost = 0, 0.0
    for members in equal:
        length = problem.lengths[members[0]]
        if merged and lost + len(members) * (length - first) <= most_lost:
            lost += len(members) * (length - first)
            merged[-1].extend(members)
        else:
            first, lost = length, 0.0
            merged.append(list(members))
    return merged
