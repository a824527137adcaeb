"""Attention over context-parallel ranks equals upstream's own run on one rank step for step, through `pretrain`.

The reference is arm U at C = 1: the wheel with the cpu and local patches alone.
"""

from collections.abc import Callable

import pytest

from tests.distributed.equality import Start, assert_equal
from tests.distributed.flags import DOCUMENTS, FULL, OVERLAP, PP2, SELECTIVE, TP2, VPP, flags
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
    "2 x 2, context-first": (4, "", f"{HYBRID} --context-parallel-placement context-first"),
    "gathered": (4, "", f"{CP4} --cp-comm-type all_gather"),
    "double ring": (4, "", f"{CP4} --ring-window 2"),
    "a kind for each layer": (4, "", f"{CP4} --cp-comm-type p2p a2a all_gather a2a --num-query-groups 4"),
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
    "TP 2, sequence parallel": (4, "", f"{CP2} --cp-comm-type a2a {TP2} --sequence-parallel"),
    "PP 2": (4, "", f"{CP2} {PP2}"),
    "PP 2, V 2": (4, "", f"{CP2} {PP2} {VPP} {FULL}"),
    "DP 2, distributed optimizer, overlap": (4, "", f"{CP2} {OVERLAP}"),
    "tied embeddings": (2, "--tied", CP2),
}
SLOW: set[str] = set()


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_equals_upstream_in_float64(
    ranks: RankPool, start: Start, upstream: Callable[..., Run], case: str, tell: Callable[[str], None]
) -> None:
    world, model, own = CASES[case]
    run = run_arm(ranks, "O", world, start(model) + flags(own), float64=True, snapshots=(1, 4))
    assert_equal(run, upstream(model), case, tell)


SEGMENTS = {
    "ring": (2, "", f"{CP2} --seq1f1b-splits 3 --seq1f1b-partition 32,20,12"),
    "Ulysses": (2, "", f"{CP2} --cp-comm-type a2a --seq1f1b-splits 3"),
    "gathered": (2, "", f"{CP2} --cp-comm-type all_gather --seq1f1b-splits 3"),
    "2 x 2": (4, "", f"{HYBRID} --seq1f1b-splits 3"),
    "double ring": (4, "", f"{CP4} --ring-window 2 --seq1f1b-splits 2"),
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


@pytest.mark.parametrize("case", list(SEGMENTS))
def test_segments_equal_upstream_in_float64(
    ranks: RankPool, start: Start, upstream: Callable[..., Run], case: str, tell: Callable[[str], None]
) -> None:
    world, model, own = SEGMENTS[case]
    run = run_arm(ranks, "O", world, start(model) + flags(own), float64=True, snapshots=(1, 4))
    assert_equal(run, upstream(model), case, tell)
