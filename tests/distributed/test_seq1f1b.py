"""Seq1F1B equals upstream's own run step for step, through `pretrain`, whatever it is combined with.

The reference is arm U: the wheel with the cpu and local patches alone. In float64 segments differ from whole sequences
by reassociation alone.
"""

from collections.abc import Callable

import pytest

from tests.distributed.equality import SNAPSHOTS, Start, assert_equal
from tests.distributed.flags import DOCUMENTS, FULL, MOE, OVERLAP, PP2, PP4, SELECTIVE, TINY, TP2, VPP, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm

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
    "TP 2, sequence parallel": (4, "", f"{PP2} {TP2} --sequence-parallel --seq1f1b-splits 3"),
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
    "tied embeddings": (2, "--tied", f"{PP2} --seq1f1b-splits 3"),
    "tied embeddings, zero bubble": (2, "--tied", f"{PP2} --seq1f1b-splits 3 --zero-bubble"),
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
    "no positions": (2, "--position-embedding-type none", f"{PP2} --seq1f1b-splits 3"),
    "rotary positions, a half, scaled": (2, "--rotary-percent 0.5 --use-rope-scaling", f"{PP2} --seq1f1b-splits 3"),
    "mixture of experts": (2, MOE, f"{PP2} --seq1f1b-splits 3"),
    "per-token loss": (2, "--calculate-per-token-loss", f"{PP2} --seq1f1b-splits 3"),
    "micro-batches of two": (2, "--micro-batch-size 2", f"{PP2} --seq1f1b-splits 3"),
}

# A regression case or a neighbour above covers these; -m slow runs them.
SLOW = {
    "K 2",
    "K 4, even",
    "slack 2",
    "zero bubble, K 1",
    "TP 2",
    "DP 2, distributed optimizer, overlap",
    "full recompute",
    "full recompute, V 2",
    "tied embeddings",
    "sliding window",
    "no positions",
    "rotary positions, a half, scaled",
    "learned positions",
    "K 3, balanced",
    "PP 4, K 2, slack",
    "V 2, K 2",
    "V 2, K 2 and slack",
    "TP 2, sequence parallel, zero bubble",
    "V 2, K 1 and slack",
    "DP 2, overlap, zero bubble",
    "documents, V 2",
    "micro-batches of two",
    "multi-query attention",
    "PP 4, K 4",
    "K 3, odd lengths",  # seq1f1b.toml, and both forms of loss below
    "V 2, K 3",  # both forms of loss below
    "zero bubble, K 3",  # with tied embeddings, with full recompute
    "documents",  # seq1f1b-documents.toml, and on four stages
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_equals_upstream_in_float64(
    ranks: RankPool, start: Start, upstream: Callable[..., Run], case: str, tell: Callable[[str], None]
) -> None:
    world, model, own = CASES[case]
    run = run_arm(ranks, "O", world, start(model) + flags(own), float64=True, snapshots=SNAPSHOTS)
    assert_equal(run, upstream(model), f"Seq1F1B, {case}", tell)


@pytest.mark.parametrize("twist", ["ragged_mask", "mean_loss"])
@pytest.mark.parametrize("own", ["--seq1f1b-partition 37,26,1", f"--seq1f1b-partition even {VPP}"])
def test_any_mask_and_both_forms_of_loss(
    ranks: RankPool, start: Start, upstream: Callable[..., Run], twist: str, own: str, tell: Callable[[str], None]
) -> None:
    place = f"tests.distributed.twists:{twist}"
    own = f"{PP2} --seq1f1b-splits 3 {own}"
    run = run_arm(ranks, "O", 2, start("") + flags(own), float64=True, snapshots=SNAPSHOTS, mutant=place)
    assert run.planted > 0
    assert_equal(run, upstream("", place), f"Seq1F1B, {twist}, {own}", tell)


def test_flag_changes_the_schedule(ranks: RankPool) -> None:
    """Two stages, 8 micro-batches: 16 forwards of whole sequences, three times as many of three segments."""
    once = flags(TINY, PP2, "--train-iters 1")

    def forwards(twist: str, own: str = "--seq1f1b-splits 3") -> tuple[int, bool]:
        place = f"tests.distributed.twists:{twist}"
        run = run_arm(ranks, "O", 2, once + flags(own), mutant=place, timeout=60)
        return run.planted, "seq1f1b.schedule" in run.header["patches"]

    assert forwards("counted_forwards", "") == (16, False)
    assert forwards("counted_forwards") == (48, True)
    assert forwards("counted_forwards_without_the_schedule") == (16, False)
