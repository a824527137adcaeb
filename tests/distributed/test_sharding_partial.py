"""Sharded runs that train a part of the parameters equal upstream's run on one rank with the same ones frozen."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from tests.distributed.equality import RELATIVE, STEPS, Equal, Start, assert_steps_equal, distance
from tests.distributed.flags import EVALUATED, FULL, PP2, TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors

BATCH = "--global-batch-size 8"
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
BY_DEFAULT = ["ING"]


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in BY_DEFAULT else pytest.mark.slow) for c in CASES])
def test_equals_upstream_with_the_same_frozen(equal: Equal, case: str) -> None:
    pattern, layout = CASES[case]
    equal(f"sharding, a part is trained, {case}", 4, f"{BATCH} --train-only {pattern}", layout)


def test_frozen_parameters_are_sharded_and_never_sent_after_a_step(ranks: RankPool, start: Start) -> None:
    line = [*start(BATCH), *flags(f"--paro ING {PAIRS} {ASYNC}"), "--train-only", FIRST]
    run = run_arm(ranks, "O", 4, line, mutant="tests.distributed.script_variants:counted_parameter_sends")
    trained = 64 * 2 * 128 + 128 * 64  # both matrices of layer 0's MLP: SwiGLU's pair, and back
    assert run.planted == 4 * STEPS * trained
    between = run_arm(ranks, "O", 4, line, mutant="tests.distributed.script_variants:counted_frozen_without_memory")
    assert between.planted == 4 * STEPS * FROZEN


@pytest.mark.slow
def test_checkpoint_of_a_part_goes_on_under_another_strategy(
    ranks: RankPool, start: Start, upstream: Callable[..., Run], tmp_path: Path
) -> None:
    only = ["--train-only", SOME]
    saved = run_arm(
        ranks, "O", 4, [*start(BATCH), *flags(f"--paro ING {PAIRS} --exit-interval 1"), *only], tmp_path, float64=True
    )
    line = [*flags(TINY, EVALUATED, BATCH, f"--paro GGG {ASYNC}", PAIRS), *only, "--load", str(tmp_path)]
    run = run_arm(ranks, "O", 4, line, float64=True, snapshots=(1, STEPS))
    assert_steps_equal(run.curve, upstream(f"{BATCH} --train-only {SOME}").curve[1:])
    assert distance(run.snapshots[STEPS], upstream(f"{BATCH} --train-only {SOME}").snapshots[STEPS]) <= 10 * RELATIVE
    tensors, loaded = logical_tensors(saved.checkpoint(1)), run.snapshots[1].tensors
    assert loaded.keys() == tensors.keys()
    assert all(numpy.array_equal(array, tensors[name].numpy()) for name, array in loaded.items())
    states = {name.partition(".exp_avg.")[2] for name in tensors if ".exp_avg." in name}
    assert states and all(re.search(SOME, name) for name in states)
