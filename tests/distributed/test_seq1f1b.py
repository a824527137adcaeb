"""Seq1F1B equals upstream's own run step for step, through `pretrain`, whatever it is combined with.

The reference is arm U: the wheel with the cpu and local patches alone. In float64 segments differ from whole sequences
by reassociation alone.
"""

import pytest

from tests.distributed.equality import Equal
from tests.distributed.flags import (
    DOCUMENTS,
    FULL,
    MOE,
    OVERLAP,
    PP2,
    PP4,
    SELECTIVE,
    SHALLOW,
    TIED,
    TINY,
    TP2,
    VPP,
    flags,
)
from tests.pool import RankPool
from tests.regression.arm import run_arm

# name: (ranks, model flags of both arms, flags of arm O)
CASES = {
    "K 2": (2, "", f"{PP2} --seq1f1b-splits 2"),
    "K 3, balanced": (2, "", f"{PP2} --seq1f1b-splits 3 --seq1f1b-partition balanced"),
    "K 3, odd lengths": (2, "", f"{PP2} --seq1f1b-splits 3 --seq1f1b-partition 37,26,1"),
    "K 4, even": (2, "", f"{PP2} --seq1f1b-splits 4 --seq1f1b-partition even"),
    "one stage": (1, "", "--seq1f1b-splits 4"),
    "PP 4, K 4": (4, "", f"{PP4} --seq1f1b-splits 4"),
    "PP 4, K 2, slack": (4, "", f"{PP4} --seq1f1b-splits 2 --seq1f1b-slack 1"),
    "slack 2": (2, "", f"{PP2} --seq1f1b-splits 3 --seq1f1b-slack 2"),
    "V 2, K 1 and slack": (2, "--global-batch-size 9", f"{PP2} {VPP} --seq1f1b-slack 1"),
    "V 2, K 2 and slack": (2, "", f"{PP2} {VPP} --seq1f1b-splits 2 --seq1f1b-slack 1"),
    "V 2, K 2": (2, "", f"{PP2} {VPP} --seq1f1b-splits 2"),
    "V 2, K 3": (2, "", f"{PP2} {VPP} --seq1f1b-splits 3"),
    "zero bubble, K 1": (2, "", f"{PP2} --zero-bubble"),
    "zero bubble, K 3": (2, "", f"{PP2} --seq1f1b-splits 3 --zero-bubble"),
    "zero bubble, PP 4, K 2, slack": (4, "", f"{PP4} --seq1f1b-splits 2 --seq1f1b-slack 1 --zero-bubble"),
    "TP 2": (4, "", f"{PP2} {TP2} --seq1f1b-splits 3"),
    "TP 2, sequence parallel": (4, SHALLOW, f"{PP2} {TP2} --sequence-parallel --seq1f1b-splits 3"),
    "TP 2, sequence parallel, zero bubble": (
        4,
        "",
        f"{PP2} {TP2} --sequence-parallel --seq1f1b-splits 2 --zero-bubble",
    ),
    "DP 2, distributed optimizer, overlap": (4, "", f"{PP2} {OVERLAP} --seq1f1b-splits 3"),
    "DP 2, overlap, V 2": (4, "", f"{PP2} {VPP} {OVERLAP} --seq1f1b-splits 2"),
    "DP 2, overlap, zero bubble": (4, "", f"{PP2} {OVERLAP} --seq1f1b-splits 2 --zero-bubble"),
    "full recompute": (2, "", f"{PP2} {FULL} --seq1f1b-splits 3"),
    "full recompute, zero bubble": (2, "", f"{PP2} {FULL} --seq1f1b-splits 3 --zero-bubble"),
    "full recompute, V 2": (2, "", f"{PP2} {VPP} {FULL} --seq1f1b-splits 2"),
    "selective recompute": (2, "", f"{PP2} {SELECTIVE} --seq1f1b-splits 3"),
    "tied embeddings": (2, TIED, f"{PP2} --seq1f1b-splits 3"),
    "tied embeddings, zero bubble": (2, TIED, f"{PP2} --seq1f1b-splits 3 --zero-bubble"),
    "multi-query attention": (2, "--num-query-groups 1", f"{PP2} --seq1f1b-splits 3"),
    "sliding window": (2, "--window-size 10,0", f"{PP2} --seq1f1b-splits 3"),
    "sliding window, every other layer": (
        2,
        "--window-size 10,0 --window-attn-skip-freq 2",
        f"{PP2} --seq1f1b-splits 3",
    ),
    "documents": (2, DOCUMENTS, f"{PP2} --seq1f1b-splits 3"),
    "documents, four stages": (4, DOCUMENTS, f"{PP4} --seq1f1b-splits 3"),
    "documents, V 2": (2, DOCUMENTS, f"{PP2} {VPP} --seq1f1b-splits 3"),
    "learned positions": (2, "--position-embedding-type learned_absolute", f"{PP2} --seq1f1b-splits 3"),
    "no positions": (2, "--position-embedding-type none --global-batch-size 8", f"{PP2} --seq1f1b-splits 3"),
    "rotary positions, a half, scaled": (2, "--rotary-percent 0.5 --use-rope-scaling", f"{PP2} --seq1f1b-splits 3"),
    "mixture of experts": (2, f"{MOE} {SHALLOW}", f"{PP2} --seq1f1b-splits 3"),
    "per-token loss": (2, "--calculate-per-token-loss", f"{PP2} --seq1f1b-splits 3"),
    "micro-batches of two": (2, "--micro-batch-size 2", f"{PP2} --seq1f1b-splits 3"),
}

# What no regression case (seq1f1b*.toml) proves by default, nor a test of losses, masks or frozen layers.
QUICK = {
    "one stage",
    "zero bubble, PP 4, K 2, slack",
    "TP 2, sequence parallel",
    "DP 2, overlap, V 2",
    "full recompute, zero bubble",
    "selective recompute",
    "mixture of experts",
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES])
def test_equals_upstream_in_float64(equal: Equal, case: str) -> None:
    equal(f"Seq1F1B, {case}", *CASES[case])


ODD, EVEN = "--seq1f1b-partition 37,26,1", f"--seq1f1b-partition even {VPP}"


@pytest.mark.parametrize(
    ("variant", "own"),
    [
        ("ragged_mask", ODD),
        ("mean_loss", EVEN),
        pytest.param("ragged_mask", EVEN, marks=pytest.mark.slow),
        pytest.param("mean_loss", ODD, marks=pytest.mark.slow),
    ],
)
def test_any_mask_and_both_forms_of_loss(equal: Equal, variant: str, own: str) -> None:
    own = f"{PP2} --seq1f1b-splits 3 {own}"
    assert equal(f"Seq1F1B, {variant}, {own}", 2, "", own, f"tests.distributed.script_variants:{variant}").planted > 0


def test_flag_changes_the_schedule(ranks: RankPool) -> None:
    """Two stages and 8 micro-batches make 16 forwards of whole sequences, and three times as many of 3 segments."""
    once = flags(TINY, PP2, "--train-iters 1")

    def forwards(variant: str, own: str = "--seq1f1b-splits 3") -> tuple[int, bool]:
        place = f"tests.distributed.script_variants:{variant}"
        run = run_arm(ranks, "O", 2, once + flags(own), mutant=place)
        return run.planted, "seq1f1b.schedule" in run.header["patches"]

    assert forwards("counted_forwards", "") == (16, False)
    assert forwards("counted_forwards") == (48, True)
    assert forwards("counted_forwards_without_the_schedule") == (16, False)
