"""Attention over context-parallel ranks equals upstream's own run on one rank step for step, through `pretrain`.

The reference is arm U at C = 1: the wheel with the cpu and local patches alone.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.equality import RELATIVE, SNAPSHOTS, Equal, Start, assert_steps_equal, worst
from tests.distributed.flags import DOCUMENTS, FULL, MOE, OVERLAP, PP2, SELECTIVE, SHALLOW, TIED, TINY, TP2, VPP, flags
from tests.pool import RankPool
from tests.regression.arm import Run, run_arm

CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
HYBRID = f"{CP4} --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"
MHA, MQA = "--num-query-groups 4", "--num-query-groups 1"

CASES = {
    "1 x 2": (2, "", CP2),
    "2 x 1": (2, "", f"{CP2} --cp-comm-type a2a"),
    "1 x 4": (4, "", CP4),
    "4 x 1": (4, "", f"{CP4} --cp-comm-type a2a"),
    "2 x 2": (4, "", HYBRID),
    "2 x 2, context-first": (4, SHALLOW, f"{HYBRID} --context-parallel-placement context-first"),
    "gathered": (4, "", f"{CP4} --cp-comm-type all_gather"),
    "double ring": (4, "", f"{CP4} --ring-window 2"),
    "a kind for each layer": (4, "", f"{CP4} --cp-comm-type p2p a2a all_gather a2a"),
    "chosen": (4, "", f"{CP4} --context-parallel-auto"),
    "multi-head": (4, MHA, HYBRID),
    "multi-query": (4, MQA, HYBRID),
    "multi-query, 4 x 1": (4, MQA, f"{CP4} --cp-comm-type a2a"),
    "documents": (4, DOCUMENTS, HYBRID),
    "documents, gathered": (2, DOCUMENTS, f"{CP2} --cp-comm-type all_gather"),
    "sliding window": (4, "--window-size 10,0", HYBRID),
    "micro-batches of two": (2, "--micro-batch-size 2", CP2),
    "learned positions": (2, "--position-embedding-type learned_absolute", CP2),
    "per-token loss": (2, "--calculate-per-token-loss", CP2),
    "full recompute": (4, "", f"{HYBRID} {FULL}"),
    "full recompute, documents": (2, DOCUMENTS, f"{CP2} {FULL}"),
    "selective recompute": (2, "", f"{CP2} {SELECTIVE}"),
    "TP 2": (4, "", f"{CP2} {TP2}"),
    "TP 2, sequence parallel": (4, SHALLOW, f"{CP2} --cp-comm-type a2a {TP2} --sequence-parallel"),
    "PP 2": (4, "", f"{CP2} {PP2}"),
    "PP 2, V 2": (4, "", f"{CP2} {PP2} {VPP} {FULL}"),
    "DP 2, distributed optimizer, overlap": (4, "", f"{CP2} {OVERLAP}"),
    "tied embeddings": (2, TIED, CP2),
    "mixture of experts": (2, MOE, CP2),
}

SEGMENTS = {
    "ring": (2, "", f"{CP2} --seq1f1b-splits 3 --seq1f1b-partition 32,20,12"),
    "Ulysses": (2, "", f"{CP2} --cp-comm-type a2a --seq1f1b-splits 3"),
    "gathered": (2, "", f"{CP2} --cp-comm-type all_gather --seq1f1b-splits 3"),
    "2 x 2": (4, "", f"{HYBRID} --seq1f1b-splits 3"),
    "double ring": (4, SHALLOW, f"{CP4} --ring-window 2 --seq1f1b-splits 2"),
    "PP 2": (4, "", f"{CP2} {PP2} --seq1f1b-splits 3"),
    "PP 2, V 2": (4, "", f"{CP2} {PP2} {VPP} --seq1f1b-splits 3"),
    "PP 2, zero bubble": (4, "", f"{CP2} {PP2} --zero-bubble --seq1f1b-splits 3"),
    "PP 2, full recompute": (4, "", f"{CP2} {PP2} {FULL} --seq1f1b-splits 3"),
    "PP 2, documents": (4, DOCUMENTS, f"{CP2} {PP2} --seq1f1b-splits 3"),
    "documents, gathered": (2, DOCUMENTS, f"{CP2} --cp-comm-type all_gather --seq1f1b-splits 3"),
    "selective recompute": (2, "", f"{CP2} {SELECTIVE} --seq1f1b-splits 3"),
    "TP 2, sequence parallel": (4, "", f"{CP2} {TP2} --sequence-parallel --seq1f1b-splits 3"),
    "sliding window": (2, "--window-size 10,0", f"{CP2} --seq1f1b-splits 3"),
    "DP 2": (4, "", f"{CP2} {OVERLAP} --seq1f1b-splits 2"),
}

# What no regression case (usp-*.toml) proves by default, nor test_context_lanes.py.
QUICK = {"TP 2, sequence parallel"}
QUICK_SEGMENTS = {"double ring"}


def cases(names: Iterable[str], quick: set[str]) -> list[Any]:
    """Return parameters, slow but for the quick ones."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in quick)) for name in names]


@pytest.mark.parametrize("case", cases(CASES, QUICK))
def test_equals_upstream_in_float64(equal: Equal, case: str) -> None:
    equal(f"context, {case}", *CASES[case])


MASKED = {
    "2 x 2": (4, HYBRID),
    "PP 2": (4, f"{CP2} {PP2}"),
    "segments": (2, f"{CP2} --seq1f1b-splits 3"),
    "segments, PP 2, gathered": (4, f"{CP2} {PP2} --cp-comm-type all_gather --seq1f1b-splits 2"),
}


@pytest.mark.parametrize("case", cases(SEGMENTS, QUICK_SEGMENTS))
def test_segments_equal_upstream_in_float64(equal: Equal, case: str) -> None:
    equal(f"context and segments, {case}", *SEGMENTS[case])


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        pytest.param("empty_ranks", "2 x 2", marks=pytest.mark.slow),
        ("empty_ranks", "segments, PP 2, gathered"),
        pytest.param("empty_ranks", "PP 2", marks=pytest.mark.slow),
        pytest.param("empty_ranks", "segments", marks=pytest.mark.slow),
        *[pytest.param("ragged_mask", name, marks=pytest.mark.slow) for name in MASKED],
    ],
)
def test_any_mask(equal: Equal, variant: str, name: str) -> None:
    world, own = MASKED[name]
    assert (
        equal(f"context, {variant}, {name}", world, "", own, f"tests.distributed.script_variants:{variant}").planted > 0
    )


def test_a_loss_of_ones_own_tokens_is_another(ranks: RankPool, start: Start, upstream: Callable[..., Run]) -> None:
    """Without the record each rank divides by its own valid tokens: the reported loss is right, gradients are not."""
    variant = "tests.distributed.script_variants:empty_ranks"
    run = run_arm(
        ranks, "O", 2, start("") + flags(CP2), float64=True, snapshots=SNAPSHOTS, mutant=f"{variant}_without_the_record"
    )
    reference = upstream("", variant)
    assert "usp.loss" not in run.header["patches"] and "usp.core-attention" in run.header["patches"]
    assert abs(run.curve[0]["loss"] / reference.curve[0]["loss"] - 1) < RELATIVE
    assert worst(run.curve, reference.curve, "grad_norm") > 1e-3


@pytest.mark.slow  # as under segments, in test_seq1f1b_more.py
def test_checkpoints_go_both_ways(ranks: RankPool, tmp_path: Path) -> None:
    base = flags(TINY, "--save-interval 2")
    theirs = run_arm(ranks, "U", 1, base, tmp_path / "U", float64=True)
    run_arm(ranks, "O", 2, [*base, *flags(CP2)], tmp_path / "O", float64=True)
    from_theirs, from_ours = (["--load", str(tmp_path / arm), "--ckpt-step", "2"] for arm in "UO")
    resumed = run_arm(ranks, "O", 2, [*base, *flags(CP2), *from_theirs], float64=True)
    returned = run_arm(ranks, "U", 1, [*base, *from_ours], float64=True)
    for run in (resumed, returned):
        assert_steps_equal(run.curve, theirs.curve[2:])
