"""A run that is stopped and resumed in the same layout goes on with the same bits: data, random numbers, states."""

from pathlib import Path

import pytest
import torch

from tests.distributed.flags import SHALLOW, TINY, flags
from tests.packed_corpus import RAGGED, write_documents
from tests.pool import RankPool
from tests.regression.arm import run_arm
from tests.regression.tensors import logical_tensors

HALF, WHOLE = 2, 4
STEPS = f"{TINY} {SHALLOW} --train-iters {WHOLE} --save-interval {HALF}"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
CASES = {
    "PaRO, dropout, bf16": (2, f"--paro GGG --paro-group-size 2 {OVERLAP} {DROPOUT} --bf16"),
    "PaRO, selective overlap": (4, f"--paro IIG --paro-group-size 2 {OVERLAP} --paro-selective-overlap"),
    "PaRO, segments": (2, f"--paro NIG --paro-group-size 2 --seq1f1b-splits 2 {DROPOUT}"),
    "FlexSP": (2, "--flexsp --flexsp-max-tokens-per-rank 72 --paro IIG --paro-group-size 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_goes_on_with_the_same_bits(ranks: RankPool, tmp_path: Path, case: str) -> None:
    world, own = CASES[case]
    base = flags(STEPS, own)
    if "--flexsp" in own:
        base = [flag for flag in base if flag != "--mock-data"] + write_documents(tmp_path / "corpus", RAGGED, 2000)
    whole = run_arm(ranks, "O", world, base, tmp_path / "whole", keep_batches=True)
    run_arm(ranks, "O", world, [*base, "--exit-interval", str(HALF)], tmp_path / "half")
    load = [*base, "--load", str(tmp_path / "half")]
    resumed = run_arm(ranks, "O", world, load, tmp_path / "resumed", keep_batches=True)
    assert resumed.curve == whole.curve[HALF:]
    for step, expected in zip(resumed.batches, whole.batches[HALF:], strict=True):
        for batch, other in zip(step, expected, strict=True):
            assert batch.keys() == other.keys() and all((batch[name] == other[name]).all() for name in batch)
    one, other = (logical_tensors(run.checkpoint(WHOLE)) for run in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
