"""With --gradient-accumulation-fusion, whose kernel adds weight gradients to `main_grad`, runs train as without it."""

import pytest

from tests.distributed.equality import STEPS, Start, worst
from tests.distributed.flags import PP2, TIED, TP2, flags
from tests.pool import RankPool
from tests.regression.arm import run_arm

VARIANT = "tests.distributed.script_variants:fused_weight_gradients"
K3, NARROW = "--seq1f1b-splits 3 --seq1f1b-partition 37,26,1", "--bf16 --grad-reduce-in-bf16"
EXACT, ROUNDED = 1e-4, 0.05  # a gradient that is lost or added twice is off by 0.3 or more
# ranks, model flags of both arms, flags of arm O, bound of the relative difference
CASES = [
    (2, NARROW, f"{PP2} {K3}", ROUNDED),
    (2, "", f"--paro GGG {K3}", EXACT),
]
SLOW = [
    (2, "", f"{PP2} {K3}", EXACT),
    (1, NARROW, f"{K3} --overlap-grad-reduce", ROUNDED),
    (2, NARROW, f"{PP2} --num-virtual-stages-per-pipeline-rank 2 {K3}", ROUNDED),
    (2, NARROW, f"{PP2} {K3} --zero-bubble", ROUNDED),
    (2, f"{NARROW} {TIED}", f"{PP2} {K3} --overlap-grad-reduce", ROUNDED),
    (2, "", f"{TP2} --sequence-parallel --seq1f1b-splits 2", EXACT),
    (2, "", f"{PP2} --zero-bubble", EXACT),
    (2, "", "--paro NIG --paro-group-size 2 --overlap-grad-reduce", EXACT),
    (2, NARROW, "--paro GGG", ROUNDED),
    (2, "", "--context-parallel-size 2 --cp-comm-type a2a", EXACT),
    (1, "", f"--cross-entropy-chunk-tokens 24 {K3}", EXACT),
    (1, NARROW, f"--cross-entropy-chunk-tokens 24 {K3}", ROUNDED),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_as_upstream_without_fusion(ranks: RankPool, start: Start, case: tuple[int, str, str, float]) -> None:
    world, model, own, bound = case
    theirs = run_arm(ranks, "U", 1, start(model))
    ours = run_arm(ranks, "O", world, start(model) + flags(own), mutant=VARIANT)
    assert ours.planted and len(theirs.curve) == STEPS
    assert max(worst(ours.curve, theirs.curve, name) for name in ("loss", "grad_norm")) <= bound
