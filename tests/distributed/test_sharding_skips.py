"""All ranks skip steps that overflow or have NaN gradients, regardless of the rank that has them."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed.equality import RELATIVE
from tests.distributed.flags import OVERLAP, TINY, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors

ASYNC = "--overlap-grad-reduce --overlap-param-gather"
PAIRS = "--paro-group-size 2"
# Scaled losses overflow in float16 until the scale is small enough, which takes a few halvings. One micro-batch: where
# gradients are sharded, each is divided by the ranks before it is added, so that a sum of several overflows later.
HALF = (
    "--fp16 --initial-loss-scale 2097152 --hysteresis 1 --train-iters 7 --lr 1e-4 --min-lr 1e-5 --global-batch-size 4"
)
FIVE = "--train-iters 5 --global-batch-size 4"
NAN_GRADIENT = "tests.distributed.script_variants:nan_gradient_on_rank_one"
BY_DEFAULT = ["IIG"]
ENDED = "upstream ended with status 16"  # resume to tell a passing fault from a lasting one
SAVED = "iter_0000004"
RUNNING = ["NNN", "NNI", "NNG", "NII", "NIG", "III", "IIG", "IGG", "NGG", "GGG", "ING"]
CASES = [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in RUNNING]


@pytest.fixture(scope="module")
def upstream(ranks: RankPool) -> Callable[[str | None], Run]:
    """Return a function that makes (once) upstream's run on as many ranks, spoilt or not."""

    @functools.cache
    def run(variant: str | None) -> Run:
        return run_arm(ranks, "U", 4, flags(TINY, HALF, OVERLAP), mutant=variant)

    return run


@pytest.mark.parametrize("name", CASES)
def test_skips_the_same_steps_as_upstream(ranks: RankPool, upstream: Callable[[str | None], Run], name: str) -> None:
    theirs = upstream(NAN_GRADIENT)
    ours = run_arm(ranks, "O", 4, flags(TINY, HALF, f"--paro {name} {PAIRS} {ASYNC}"), mutant=NAN_GRADIENT)
    assert ours.planted == theirs.planted > 0
    skipped = [step["skipped"] for step in theirs.curve]
    # The first scale overflows, a halved one does not; the fifth step is the spoilt one. When the scale is small enough
    # is for this processor's rounding to say, for both alike.
    assert (skipped[0], skipped[3], skipped[4], skipped[-1]) == (1, 0, 1, 0)
    assert [step["skipped"] for step in ours.curve] == skipped
    assert [step["learning_rate"] for step in ours.curve] == [step["learning_rate"] for step in theirs.curve]
    for a, b in zip(ours.curve, theirs.curve, strict=True):
        # float16 rounds by 2**-11. A loss is a mean over tokens; behind a gradient are sixteen products, each rounded,
        # one after another (four layers of four).
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-10)
        if not b["skipped"]:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=16 * 2**-11)


@pytest.fixture(scope="module")
def upstreams_end(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return what upstream saves as it ends over a gradient that is no number."""
    folder = tmp_path_factory.mktemp("upstream")
    with pytest.raises(RankFailure, match=ENDED):
        run_arm(ranks, "U", 4, flags(TINY, OVERLAP, FIVE), folder, float64=True, mutant=NAN_GRADIENT)
    return logical_tensors(folder / SAVED)


@pytest.mark.parametrize("name", CASES)
def test_nan_in_one_ranks_gradient_ends_the_run(
    ranks: RankPool, upstreams_end: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    """Upstream repeats the step on all ranks, saves the state before it, and exits."""
    with pytest.raises(RankFailure, match=ENDED):
        line = flags(TINY, f"--paro {name} {PAIRS} {ASYNC} {FIVE}")
        run_arm(ranks, "O", 4, line, tmp_path, float64=True, mutant=NAN_GRADIENT)
    found = (ranks.logs / f"job{ranks.jobs:03d}-rank0.log").read_text()
    assert "step 5: a gradient is not finite" in found and "It first appeared on rank 1" in found
    assert "mlp.linear_fc2.weight" in found
    saved = logical_tensors(tmp_path / SAVED)
    weights = [tensor for tensor in upstreams_end if not tensor.startswith("optimizer.")]
    assert weights and all((saved[w] - upstreams_end[w]).norm() <= RELATIVE * upstreams_end[w].norm() for w in weights)


@pytest.mark.slow
def test_nan_that_is_not_looked_for_is_in_every_ranks_norm(ranks: RankPool) -> None:
    line = flags(TINY, f"--paro IIG {PAIRS} {ASYNC} --no-check-for-nan-in-loss-and-grad --train-iters 5")
    run = run_arm(ranks, "O", 4, line, mutant=NAN_GRADIENT)
    assert [step["grad_norm"] == step["grad_norm"] for step in run.curve] == [True] * 4 + [False]
