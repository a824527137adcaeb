"""--train-only keeps frozen parameters bitwise and trains the others as in a full training, in every layout."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.distributed.equality import STEPS, Equal, Start
from tests.distributed.flags import EVALUATED, FULL, OVERLAP, PP2, SELECTIVE, TINY, TP2, VPP, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors

LAST = r"layers\.3\.mlp\.linear_fc\d\.weight|final_layernorm"
FIRST = r"layers\.0\.mlp\.linear_fc\d\.weight"
NORMS = "norm"
EMBEDDING = "embedding"
RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"

# What is trained, ranks, layout, tied embedding
LAYOUTS = {
    "the last layer, PP 2: nothing on the first stage": (LAST, 2, PP2, False),
    "the last layer, PP 4": (LAST, 4, f"{PP2} --pipeline-model-parallel-size 4 --use-distributed-optimizer", False),
    "the first layer, PP 2: nothing on the last stage": (FIRST, 4, f"{PP2} {OVERLAP}", False),
    "the first layer, virtual stages": (FIRST, 2, f"{PP2} {VPP}", False),
    "the first layer, full recompute": (FIRST, 1, FULL, False),
    "the first layer, selective recompute": (FIRST, 1, SELECTIVE, False),
    "the last layer, Seq1F1B": (LAST, 2, f"{PP2} --seq1f1b-splits 2", False),
    "norms, TP 2, sequence parallel": (NORMS, 2, f"{TP2} --sequence-parallel", False),
    "norms, DP 2": (NORMS, 2, OVERLAP, False),
    "the tied embedding, PP 2": (EMBEDDING, 2, PP2, True),
    "the last layer, tied embedding, PP 2": (LAST, 4, f"{PP2} --use-distributed-optimizer", True),
}

MODEL = "--clip-grad 0"  # so that a gradient alone is what it is among all


def only(pattern: str) -> str:
    """Return the flags of a model that is trained partially."""
    return f"{MODEL} --train-only {pattern}"


@pytest.mark.parametrize("pattern", [LAST, FIRST, NORMS, EMBEDDING])
def test_what_is_frozen_stays_and_what_is_trained_moves_as_among_all(
    start: Start, upstream: Callable[..., Run], pattern: str
) -> None:
    line = start("")
    seed = Path(line[line.index("--load") + 1]) / "iter_0000001"
    before = {name: tensor.numpy() for name, tensor in logical_tensors(seed).items()}
    run, among_all = upstream(only(pattern)), upstream(MODEL).snapshots[1].weights
    one, after = run.snapshots[1].weights, run.snapshots[STEPS].weights
    moved = 0
    for name, tensor in after.items():
        if re.search(pattern, name):
            moved += 1
            assert not numpy.array_equal(tensor, of_layer(before, name)), name
            assert numpy.array_equal(one[name], of_layer(among_all, name)), name
        else:
            assert numpy.array_equal(tensor, of_layer(before, name)), name
    assert 0 < moved < len(after)


def of_layer(stacked: Mapping[str, Any], name: str) -> Any:
    """Return a layer's tensor from where layers are stacked."""
    found = re.fullmatch(r"(.*layers\.)(\d+)\.(.*)", name)
    return stacked[name] if found is None else stacked[found[1] + found[3]][int(found[2])]


QUICK = {
    "the last layer, PP 2: nothing on the first stage",
    "the first layer, full recompute",
    "the last layer, Seq1F1B",
    "norms, TP 2, sequence parallel",
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in LAYOUTS])
def test_layout_equals_one_process_in_float64(equal: Equal, case: str) -> None:
    pattern, world, layout, tied = LAYOUTS[case]
    equal(f"a part is trained, {case}", world, only(pattern) + " --tied" * tied, layout)


@pytest.mark.parametrize("layout", [PP2, pytest.param("", marks=pytest.mark.slow)])
def test_is_saved_and_resumed(ranks: RankPool, start: Start, tmp_path: Path, layout: str) -> None:
    own = [*flags(layout), *flags(RESHARDABLE), "--train-only", LAST]
    whole = run_arm(ranks, "O", 2, [*start(MODEL), *own], tmp_path / "whole", float64=True)
    run_arm(ranks, "O", 2, [*start(MODEL), *own, *flags("--exit-interval 1")], tmp_path / "half", float64=True)
    again = [*flags(TINY, EVALUATED, MODEL), *own, "--load", str(tmp_path / "half")]
    resumed = run_arm(ranks, "O", 2, again, tmp_path / "again", float64=True)
    assert resumed.curve == whole.curve[1:]
    one, other = logical_tensors(whole.checkpoint(STEPS)), logical_tensors(resumed.checkpoint(STEPS))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    states = {name.partition(".exp_avg.")[2] for name in one if ".exp_avg." in name}
    assert states and all(re.search(LAST, name) for name in states)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"layers\.4\.", r"--train-only layers\.4\.: the pattern matches no parameter, so nothing would be trained"),
        (".", "--train-only .: the pattern matches every parameter, so nothing would be frozen"),
        ("(", "--train-only (: missing ), unterminated subpattern"),
    ],
)
def test_all_or_nothing_is_refused(ranks: RankPool, pattern: str, message: str) -> None:
    with pytest.raises(RankFailure) as failure:
        run_arm(ranks, "O", 1, [*flags(TINY), "--train-only", pattern])
    assert message in str(failure.value)
