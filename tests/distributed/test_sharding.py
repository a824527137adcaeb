"""Every sharding strategy equals upstream's own run on one rank step for step, through `pretrain`.

The reference is arm U on one rank: the wheel with the cpu and local patches alone.
"""

import pytest

from tests.distributed.equality import Equal
from tests.distributed.flags import FULL, MOE, PP2, SELECTIVE, SHALLOW, TINY, TP2, VPP, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import run_arm

ASYNC = "--overlap-grad-reduce --overlap-param-gather"
RUNNING = ["NNN", "NNI", "NNG", "NII", "NIG", "III", "IIG", "IGG", "NGG", "GGG"]
FLAT = "--paro-collectives flat"
LINKS = "--paro-links 100 1"  # so that overlapped collectives are taken, whatever this machine's links are
PAIRS = f"--paro-group-size 2 {LINKS}"
SELECT = "--paro-selective-overlap"
BUCKETS = "--ddp-bucket-size 20000"  # several, where layers are no buckets of their own

CASES = {
    **{name: (4, "", f"--paro {name} {PAIRS}") for name in RUNNING},
    **{f"{name}, overlap": (4, "", f"--paro {name} {PAIRS} {ASYNC}") for name in RUNNING},
    **{f"{name}, flat": (4, "", f"--paro {name} {FLAT}") for name in ("NNN", "NNG", "NGG", "GGG")},
    "NIG, serial": (4, "", f"--paro NIG --paro-group-size 2 --paro-collectives hierarchical {ASYNC}"),
    "NIG, default links": (4, "", f"--paro NIG --paro-group-size 2 {ASYNC}"),
    "IIG, one group": (4, "", f"--paro IIG --paro-group-size 4 {ASYNC}"),
    "IIG, groups of one": (4, "", f"--paro IIG --paro-group-size 1 {ASYNC}"),
    "NIG, one micro-batch": (4, "--global-batch-size 4", f"--paro NIG {PAIRS} {ASYNC}"),
    "GGG, full recompute": (4, "", f"--paro GGG {PAIRS} {ASYNC} {FULL}"),
    "GGG, three ranks, recompute of two layers": (
        3,
        "--global-batch-size 6",
        f"--paro GGG --paro-group-size 1 {LINKS} {ASYNC} {FULL.replace('layers 1', 'layers 2')}",
    ),
    "IIG, recompute of two layers": (
        4,
        "",
        f"--paro IIG {PAIRS} {ASYNC} {FULL.replace('layers 1', 'layers 2')}",
    ),
    "IIG, selective recompute": (4, "", f"--paro IIG {PAIRS} {ASYNC} {SELECTIVE}"),
    "IIG, tied": (4, "--tied", f"--paro IIG {PAIRS} {ASYNC}"),
    "IGG, PP 2, tied": (4, "--tied", f"--paro IGG --paro-group-size 1 {ASYNC} {PP2}"),
    "NIG, PP 2, tied": (4, "--tied", f"--paro NIG {PAIRS} {ASYNC} {PP2}"),
    "GGG, PP 2": (4, "", f"--paro GGG {PAIRS} {PP2}"),
    "IIG, PP 2, V 2": (4, "", f"--paro IIG {PAIRS} {ASYNC} {PP2} {VPP}"),
    "NIG, TP 2, sequence parallel": (4, "", f"--paro NIG {PAIRS} {ASYNC} {TP2} --sequence-parallel"),
    "GGG, TP 2, sequence parallel": (4, "", f"--paro GGG {PAIRS} {ASYNC} {TP2} --sequence-parallel"),
    "IIG, C 2": (4, SHALLOW, f"--paro IIG {PAIRS} {ASYNC} --context-parallel-size 2"),
    "IIG, C 2, selective overlap": (4, "", f"--paro IIG {PAIRS} {ASYNC} {SELECT} --context-parallel-size 2"),
    "GGG, two units ahead, recompute of two layers": (
        4,
        "",
        f"--paro GGG {PAIRS} {ASYNC} {SELECT} --paro-prefetch-units 2 {FULL.replace('layers 1', 'layers 2')}",
    ),
    "IIG, selective overlap, tied": (4, "--tied", f"--paro IIG {PAIRS} {ASYNC} {SELECT}"),
    "IIG, selective overlap, PP 2, V 2": (4, "", f"--paro IIG {PAIRS} {ASYNC} {SELECT} {PP2} {VPP}"),
    "IIG, selective overlap, segments, PP 2": (
        4,
        "",
        f"--paro IIG {PAIRS} {ASYNC} {SELECT} {PP2} --seq1f1b-splits 2",
    ),
    "ING, selective overlap, without overlapped reductions": (4, "", f"--paro ING {PAIRS} {SELECT}"),
    "ING, selective overlap, zero bubble, PP 2": (
        4,
        SHALLOW,
        f"--paro ING {PAIRS} {ASYNC} {SELECT} {PP2} --zero-bubble --seq1f1b-splits 2",
    ),
    "IIG, selective overlap, mixture of experts": (4, MOE, f"--paro IIG {PAIRS} {ASYNC} {SELECT}"),
    "NIG, segments": (4, "", f"--paro NIG {PAIRS} {ASYNC} --seq1f1b-splits 3"),
    "IIG, segments, PP 2": (4, "", f"--paro IIG {PAIRS} {ASYNC} {PP2} --seq1f1b-splits 2"),
    "NNG, zero bubble, PP 2": (4, SHALLOW, f"--paro NNG {PAIRS} {ASYNC} {PP2} --zero-bubble --seq1f1b-splits 2"),
    "IIG, mixture of experts": (4, MOE, f"--paro IIG {PAIRS} {ASYNC}"),
    "NIG, per-token loss": (4, "--calculate-per-token-loss", f"--paro NIG {PAIRS} {ASYNC}"),
    "NIG, average in collectives": (4, "", f"--paro NIG {PAIRS} {ASYNC} --ddp-average-in-collective"),
}


# All strategies equal upstream in test_sharding_checkpoints.py, too, and four in regression cases (paro-*.toml); by
# default here is what they are combined with.
QUICK = {
    "GGG, three ranks, recompute of two layers",
    "IIG, PP 2, V 2",
    "IIG, C 2, selective overlap",
    "NNG, zero bubble, PP 2",
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES])
def test_equals_upstream_in_float64(equal: Equal, case: str) -> None:
    world, model, own = CASES[case]
    equal(f"sharding, {case}", world, f"--global-batch-size 8 {model}", f"{own} {BUCKETS}")


@pytest.mark.slow
def test_two_runs_with_the_same_flags_have_the_same_bits(equal: Equal) -> None:
    """This holds without --paro-links too: no measurement determines the order of sums."""
    own = f"--paro NIG --paro-group-size 2 {ASYNC} {BUCKETS}"
    one, two = (equal("sharding, run twice", 4, "--global-batch-size 8", own) for _ in range(2))
    assert [step["loss"] for step in one.curve] == [step["loss"] for step in two.curve]
    for iteration, snapshot in one.snapshots.items():
        first, second = snapshot.tensors, two.snapshots[iteration].tensors
        assert first.keys() == second.keys() and first
        assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_a_loss_that_reads_released_parameters_is_refused(ranks: RankPool) -> None:
    """Their memory is released, so an operation on them would crash the process without a message."""
    words = "the loss function reads the parameter .*longseq_scale, but with --paro GGG parameters have memory only"
    own = flags(TINY, "--paro GGG --train-iters 1")
    with pytest.raises(RankFailure, match=words):
        run_arm(ranks, "O", 2, own, mutant="tests.distributed.losses:own_parameter")
