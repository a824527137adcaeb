"""Evaluation may use a different micro-batch size and number of micro-batches from training, in every layout."""

import functools
from collections.abc import Callable

import pytest

from tests.distributed.equality import Start
from tests.distributed.flags import DOCUMENTS, FULL, PP2, TP2, VPP, flags
from tests.distributed.probes import run_probed
from tests.pool import RankPool
from tests.regression.arm import Arm

# Training has 4 micro-batches of 2 sequences per step, evaluation 2 of 6.
SIZES = "--micro-batch-size 2 --global-batch-size 8 --eval-micro-batch-size 6 --eval-global-batch-size 12"
EVALUATED = "--eval-iters 2 --eval-interval 1 --train-iters 2"
K2 = "--seq1f1b-splits 2"
CP2 = "--context-parallel-size 2 --transformer-impl local"


@pytest.fixture(scope="module")
def reference(ranks: RankPool, start: Start) -> Callable[[str], list[float]]:
    """Return a function that gives upstream's held-out losses on one rank."""
    return functools.cache(lambda more: evaluated(ranks, "U", 1, [*start(""), *flags(SIZES, EVALUATED, more)]))


def evaluated(ranks: RankPool, arm: Arm, world: int, given: list[str]) -> list[float]:
    notes = run_probed(ranks, arm, world, given, "tests.distributed.probes:evaluations")
    return [note["lm loss"] for note in notes[-1]]


@pytest.mark.parametrize(
    ("world", "layout", "more"),
    [
        pytest.param(2, TP2, "", marks=pytest.mark.slow),
        (2, f"{PP2} {K2}", DOCUMENTS),
        pytest.param(4, f"{TP2} --sequence-parallel {PP2} {K2}", "", marks=pytest.mark.slow),
        pytest.param(2, f"{PP2} {VPP} {K2}", "", marks=pytest.mark.slow),
        pytest.param(2, f"{CP2} {K2}", "", marks=pytest.mark.slow),
        pytest.param(2, f"{PP2} --zero-bubble", "", marks=pytest.mark.slow),
        pytest.param(2, f"{PP2} {K2} {FULL}", "", marks=pytest.mark.slow),
        pytest.param(2, "--paro NNI --paro-group-size 1", "", marks=pytest.mark.slow),
    ],
)
def test_held_out_losses_are_those_of_one_rank(
    ranks: RankPool, start: Start, reference: Callable[[str], list[float]], world: int, layout: str, more: str
) -> None:
    given = [*start(""), *flags(SIZES, EVALUATED, layout, more)]
    theirs, ours = reference(more), evaluated(ranks, "O", world, given)
    assert len(ours) == len(theirs) == 5 and theirs[2] < theirs[0]
    assert max(abs(a / b - 1) for a, b in zip(ours[:1], theirs[:1], strict=True)) < 1e-12  # the same weights
    assert max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) < 1e-9
