"""Scripts that freeze a part of the model themselves train as with upstream, and leak no memory."""

import pytest

from tests.distributed.equality import Equal
from tests.distributed.flags import EVALUATED, FULL, PP2, PP4, SELECTIVE, TINY, VPP, flags
from tests.distributed.probes import run_probed
from tests.pool import RankPool

PLACE = "tests.distributed.freezing:"
CP2 = "--context-parallel-size 2"
BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers 1"
GROUPS = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2"

# name: (ranks, how the script freezes, flags of arm O)
CASES = {
    "CP 2, full recompute": (2, "upper_half", f"{CP2} {FULL}"),
    "CP 2, selective recompute": (2, "upper_half", f"{CP2} {SELECTIVE}"),
    "CP 2, segments, full recompute": (2, "upper_half", f"{CP2} {FULL} --seq1f1b-splits 2"),
    "CP 2, few matrices, full recompute": (2, "few_matrices", f"{CP2} {FULL}"),
    "K 2, one stage": (1, "upper_half", "--seq1f1b-splits 2"),
    "K 3, the first stage frozen": (2, "upper_half", f"{PP2} --seq1f1b-splits 3"),
    "K 3, the first stage frozen after wrapping": (2, "upper_half_after_wrapping", f"{PP2} --seq1f1b-splits 3"),
    "K 3, the first stage frozen, full recompute": (2, "upper_half", f"{PP2} {FULL} --seq1f1b-splits 3"),
    "K 2, stages in the middle frozen": (4, "outer_layers", f"{PP4} --seq1f1b-splits 2"),
    "K 2, few matrices": (2, "few_matrices", f"{PP2} --seq1f1b-splits 2"),
    "K 2, few matrices, full recompute": (2, "few_matrices", f"{PP2} {FULL} --seq1f1b-splits 2"),
    "K 3, V 2, norms": (2, "norms", f"{PP2} {VPP} --seq1f1b-splits 3"),
    "K 2, zero bubble": (2, "upper_half", f"{PP2} --seq1f1b-splits 2 --zero-bubble"),
    "K 2, the first tokens alone": (1, "first_tokens", "--seq1f1b-splits 2"),
    "K 3, the first tokens alone, PP 2, zero bubble": (2, "first_tokens", f"{PP2} --seq1f1b-splits 3 --zero-bubble"),
    "K 2, the first tokens alone, CP 2, full recompute": (2, "first_tokens", f"{CP2} {FULL} --seq1f1b-splits 2"),
    "K 3, the last tokens alone, full recompute": (1, "last_tokens", f"{FULL} --seq1f1b-splits 3"),
    "K 2, the last tokens alone, PP 2, V 2": (2, "last_tokens", f"{PP2} {VPP} --seq1f1b-splits 2"),
    "K 3, the last tokens alone, selective recompute": (1, "last_tokens", f"{SELECTIVE} --seq1f1b-splits 3"),
    "K 2, without autograd": (1, "lower_half_without_autograd", "--seq1f1b-splits 2"),
    "whole sequences, few matrices, full recompute": (2, "few_matrices", f"{PP2} {FULL}"),
    "whole sequences, few matrices, groups of layers": (1, "few_matrices", GROUPS),
    "whole sequences, few matrices, the first layer of a stage": (1, "few_matrices", BLOCK),
}
QUICK = {
    "CP 2, full recompute",
    "K 3, the first stage frozen, full recompute",
    "K 2, few matrices, full recompute",
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES])
def test_frozen_layers_equal_upstream_in_float64(equal: Equal, case: str) -> None:
    world, how, own = CASES[case]
    run = equal(f"frozen, {case}", world, "", own, PLACE + how)
    assert run.planted > 0


@pytest.mark.parametrize(
    ("world", "own"),
    [
        (2, f"{CP2} {FULL}"),
        pytest.param(2, f"{CP2} {SELECTIVE}", marks=pytest.mark.slow),
        pytest.param(2, f"{CP2} {FULL} --seq1f1b-splits 2", marks=pytest.mark.slow),
        pytest.param(2, f"{PP2} {FULL} --seq1f1b-splits 2", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_of_a_step(ranks: RankPool, world: int, own: str) -> None:
    """Evaluations run in between. A leak of two results of 64 tokens would be at least 32 KiB per micro-batch."""
    line = flags(TINY, EVALUATED, "--train-iters 6", own)
    for notes in run_probed(ranks, "O", world, line, PLACE + "upper_half_and_live_bytes"):
        assert len(notes) == 6
        assert max(notes[2:]) - min(notes[2:]) < 1024, notes  # the first evaluation leaves some loss sums behind
