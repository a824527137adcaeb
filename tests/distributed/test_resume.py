"""A run that is stopped and resumed in the same layout goes on with the same bits: data, random numbers, states."""

from pathlib import Path

import pytest
import torch

from tests.distributed.flags import SHALLOW, TINY, flags
from tests.pool import RankPool
from tests.regression.arm import Arm, run_arm
from tests.regression.tensors import logical_tensors

HALF, WHOLE = 2, 4
STEPS = f"{TINY} {SHALLOW} --train-iters {WHOLE} --save-interval {HALF}"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
PIPELINE = "--pipeline-model-parallel-size 2 --seq1f1b-splits 2"
CONTEXT = "--transformer-impl local --context-parallel-size 2 --no-rope-fusion"
CASES: dict[str, tuple[Arm, int, str]] = {
    "upstream, dropout": ("U", 2, DROPOUT),
    "GGG, dropout, bf16": ("O", 2, f"--paro GGG --paro-group-size 2 {OVERLAP} {DROPOUT} --bf16"),
    "NNN": ("O", 2, "--paro NNN --paro-group-size 2"),
    "III": ("O", 4, f"--paro III --paro-group-size 2 {OVERLAP} --bf16"),
    "IIG": ("O", 4, f"--paro IIG --paro-group-size 2 {OVERLAP}"),
    "segments": ("O", 2, f"{PIPELINE} --hidden-dropout 0.1"),
    "segments, IIG": ("O", 4, f"{PIPELINE} --paro IIG --paro-group-size 1 --bf16"),
    "context": ("O", 2, f"{CONTEXT} --hidden-dropout 0.1"),
    "segments, context, NIG": ("O", 4, f"{PIPELINE} {CONTEXT} --paro NIG --overlap-grad-reduce"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_goes_on_with_the_same_bits(ranks: RankPool, tmp_path: Path, case: str) -> None:
    arm, world, own = CASES[case]
    base = flags(STEPS, own)
    whole = run_arm(ranks, arm, world, base, tmp_path / "whole", keep_batches=True)
    run_arm(ranks, arm, world, [*base, "--exit-interval", str(HALF)], tmp_path / "half")
    load = [*base, "--load", str(tmp_path / "half")]
    resumed = run_arm(ranks, arm, world, load, tmp_path / "resumed", keep_batches=True)
    assert resumed.curve == whole.curve[HALF:]
    for step, expected in zip(resumed.batches, whole.batches[HALF:], strict=True):
        for batch, other in zip(step, expected, strict=True):
            assert batch.keys() == other.keys() and all((batch[name] == other[name]).all() for name in batch)
    one, other = (logical_tensors(run.checkpoint(WHOLE)) for run in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
