"""Sharded runs that train a part of the parameters, against upstream's own on one rank with the same ones frozen."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from tests.distributed.equality import RELATIVE
from tests.distributed.flags import FULL, PP2, TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors

STEPS = 3
ASYNC = "--overlap-grad-reduce --overlap-param-gather"
PAIRS = "--paro-group-size 2"
SOME = r"layers\.(1|3)\.mlp|final_layernorm"  # between frozen layers, and in layers of which a part is frozen
FROZEN = 4 * 6 + 3 - 2  # six parameters in a layer, the embedding, the last norm and the output layer; two are trained
FIRST = r"layers\.0\.mlp"
NORMS = "layernorm"

CASES = {
    "ING": (SOME, f"--paro ING {PAIRS} {ASYNC}"),
    "ING, norms": (NORMS, f"--paro ING {PAIRS}"),
    "NNG": (SOME, f"--paro NNG {PAIRS} {ASYNC}"),
    "NIG": (SOME, f"--paro NIG {PAIRS} {ASYNC}"),
    "IIG": (SOME, f"--paro IIG {PAIRS} {ASYNC}"),
    "GGG": (SOME, f"--paro GGG {PAIRS} {ASYNC}"),
    "ING, full recompute": (FIRST, f"--paro ING {PAIRS} {ASYNC} {FULL}"),
    "ING, PP 2, nothing on the last stage": (FIRST, f"--paro ING --paro-group-size 1 {ASYNC} {PP2}"),
    "IIG, PP 2, nothing on the last stage": (FIRST, f"--paro IIG {PAIRS} {PP2}"),
    "GGG, PP 2, nothing on the first stage": (r"layers\.3\.mlp", f"--paro GGG {PAIRS} {ASYNC} {PP2}"),
}
BY_DEFAULT = ["ING", "NIG", "GGG", "IIG, PP 2, nothing on the last stage"]


@pytest.fixture(scope="module")
def seed(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the flags of a run from one seed checkpoint."""
    folder: Path = tmp_path_factory.mktemp("seed")
    still = flags("--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0")
    run_arm(ranks, "U", 1, flags(TINY) + still, folder, float64=True)
    return [
        *flags(TINY, f"--train-iters {STEPS}"),
        "--load",
        str(folder),
        *flags("--finetune --no-load-optim --no-load-rng"),
    ]


@pytest.fixture(scope="module")
def upstream(ranks: RankPool, seed: list[str]) -> Callable[[str], Run]:
    """Return a function that makes (once) upstream's run with all but a pattern frozen."""

    @functools.cache
    def run(pattern: str) -> Run:
        return run_arm(ranks, "U", 1, [*seed, "--train-only", pattern], float64=True, snapshots=(STEPS,))

    return run


def assert_equal(run: Run, reference: Run, first: int = 0) -> float:
    """Hold every step, weight and optimizer state to the reference; return the largest relative difference of steps."""
    apart = 0.0
    for ours, theirs in zip(run.curve, reference.curve[first:], strict=True):
        assert ours["samples"] == theirs["samples"]
        apart = max(apart, *(abs(ours[name] / theirs[name] - 1) for name in ("loss", "grad_norm")))
    assert apart <= RELATIVE
    mine, yours = run.snapshots[STEPS], reference.snapshots[STEPS]
    assert not mine.torn
    main = {name for name in mine.tensors if name.startswith("optimizer.state.param.")}  # upstream has weights alone
    assert mine.tensors.keys() - main == yours.tensors.keys()
    for name, array in yours.tensors.items():
        assert numpy.linalg.norm(mine.tensors[name] - array) <= 10 * RELATIVE * numpy.linalg.norm(array), name
    return apart


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in BY_DEFAULT else pytest.mark.slow) for c in CASES])
def test_equals_upstream_with_the_same_frozen(
    ranks: RankPool, seed: list[str], upstream: Callable[[str], Run], case: str, tell: Callable[[str], None]
) -> None:
    pattern, layout = CASES[case]
    line = [*seed, *flags(layout), "--train-only", pattern]
    run = run_arm(ranks, "O", 4, line, float64=True, snapshots=(STEPS,))
    apart = assert_equal(run, upstream(pattern))
    tell(f"float64  sharding, a part is trained, {case}: largest relative difference of loss and norm {apart:.1e}")


def test_frozen_parameters_are_sharded_and_never_sent_after_a_step(ranks: RankPool, seed: list[str]) -> None:
    line = [*seed, *flags(f"--paro ING {PAIRS} {ASYNC}"), "--train-only", FIRST]
    run = run_arm(ranks, "O", 4, line, mutant="tests.distributed.twists:counted_parameter_sends")
    trained = 64 * 2 * 128 + 128 * 64  # both matrices of layer 0's MLP: SwiGLU's pair, and back
    assert run.planted == 4 * STEPS * trained
    between = run_arm(ranks, "O", 4, line, mutant="tests.distributed.twists:counted_frozen_without_memory")
    assert between.planted == 4 * STEPS * FROZEN


def test_checkpoint_of_a_part_goes_on_under_another_strategy(
    ranks: RankPool, seed: list[str], upstream: Callable[[str], Run], tmp_path: Path
) -> None:
    only = ["--train-only", SOME]
    saved = run_arm(
        ranks, "O", 4, [*seed, *flags(f"--paro ING {PAIRS} --exit-interval 1"), *only], tmp_path, float64=True
    )
    line = [*flags(TINY, f"--train-iters {STEPS} --paro GGG {ASYNC}", PAIRS), *only, "--load", str(tmp_path)]
    run = run_arm(ranks, "O", 4, line, float64=True, snapshots=(1, STEPS))
    assert_equal(run, upstream(SOME), first=1)
    tensors, loaded = logical_tensors(saved.checkpoint(1)), run.snapshots[1].tensors
    assert loaded.keys() == tensors.keys()
    assert all(numpy.array_equal(array, tensors[name].numpy()) for name, array in loaded.items())
    states = {name.partition(".exp_avg.")[2] for name in tensors if ".exp_avg." in name}
    assert states and all(re.search(SOME, name) for name in states)
