"""Steps that overflow, and gradients that are no numbers: every rank sees them, whoever holds them."""

import functools
from collections.abc import Callable

import pytest

from tests.distributed.flags import OVERLAP, TINY, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Run, run_arm

ASYNC = "--overlap-grad-reduce --overlap-param-gather"
PAIRS = "--paro-group-size 2"
# Scaled losses overflow in float16 until the scale is small enough, which takes a few halvings.
HALF = "--fp16 --initial-loss-scale 33554432 --hysteresis 1 --train-iters 12 --lr 1e-3"
SPOILT = "tests.distributed.twists:nan_gradient_on_rank_one"
BY_DEFAULT = ["NII", "IIG", "GGG"]
RUNNING = ["NNN", "NNI", "NNG", "NII", "NIG", "III", "IIG", "IGG", "NGG", "GGG", "ING"]
CASES = [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in RUNNING]


@pytest.fixture(scope="module")
def upstream(ranks: RankPool) -> Callable[[str | None], Run]:
    """Return a function that makes (once) upstream's run on as many ranks, spoilt or not."""

    @functools.cache
    def run(twist: str | None) -> Run:
        return run_arm(ranks, "U", 4, flags(TINY, HALF, OVERLAP), mutant=twist)

    return run


@pytest.mark.parametrize("name", CASES)
def test_skips_the_same_steps_as_upstream(ranks: RankPool, upstream: Callable[[str | None], Run], name: str) -> None:
    theirs = upstream(SPOILT)
    ours = run_arm(ranks, "O", 4, flags(TINY, HALF, f"--paro {name} {PAIRS} {ASYNC}"), mutant=SPOILT)
    assert ours.planted == theirs.planted > 0
    skipped = [step["skipped"] for step in theirs.curve]
    assert skipped[2] and 2 <= sum(skipped) < len(skipped) - 2 and not skipped[-1]
    assert [step["skipped"] for step in ours.curve] == skipped
    assert [step["learning_rate"] for step in ours.curve] == [step["learning_rate"] for step in theirs.curve]
    for a, b in zip(ours.curve, theirs.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_nan_in_one_ranks_gradient_ends_the_run(ranks: RankPool, name: str) -> None:
    with pytest.raises(RankFailure, match=r"rank 1 raised(.|\n)*found NaN in local grad norm for bucket"):
        run_arm(ranks, "O", 4, flags(TINY, f"--paro {name} {PAIRS} {ASYNC}"), mutant=SPOILT)


def test_nan_that_is_not_looked_for_is_in_every_ranks_norm(ranks: RankPool) -> None:
    line = flags(TINY, f"--paro IIG {PAIRS} {ASYNC} --no-check-for-nan-in-loss-and-grad --train-iters 3")
    run = run_arm(ranks, "O", 4, line, mutant=SPOILT)
    assert [step["grad_norm"] == step["grad_norm"] for step in run.curve] == [True, True, False]
