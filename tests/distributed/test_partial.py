"""--train-only: what is frozen keeps its bits, and what is trained is trained as among all, in every layout."""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.distributed.equality import RELATIVE
from tests.distributed.flags import FULL, OVERLAP, PP2, SELECTIVE, TINY, TP2, VPP, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors

LAST = r"layers\.3\.mlp\.linear_fc\d\.weight|final_layernorm"
FIRST = r"layers\.0\.mlp\.linear_fc\d\.weight"
NORMS = "norm"
EMBEDDING = "embedding"
STEPS = 3
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"

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

Start = Callable[[bool], list[str]]
Train = Callable[[str, bool], Run]


@pytest.fixture(scope="module")
def start(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Return a function that makes (once) a seed checkpoint and returns the flags of a run from it."""

    @functools.cache
    def from_seed(tied: bool) -> list[str]:
        folder: Path = tmp_path_factory.mktemp("seed")
        base = [flag for flag in flags(TINY) if not (tied and flag == "--untie-embeddings-and-output-weights")]
        base += flags(f"--train-iters {STEPS} --clip-grad 0")
        still = flags("--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0")
        run_arm(ranks, "U", 1, base + still, folder, float64=True)
        return [*base, "--load", str(folder), *flags("--finetune --no-load-optim --no-load-rng")]

    return from_seed


@pytest.fixture(scope="module")
def single(ranks: RankPool, start: Start) -> Train:
    """Return a function that trains (once) in a single process of upstream's."""

    @functools.cache
    def train(pattern: str, tied: bool) -> Run:
        only = ["--train-only", pattern] if pattern else []
        return run_arm(ranks, "U", 1, [*start(tied), *only], float64=True, snapshots=(1, STEPS))

    return train


@pytest.mark.parametrize("pattern", [LAST, FIRST, NORMS, EMBEDDING])
def test_what_is_frozen_stays_and_what_is_trained_moves_as_among_all(start: Start, single: Train, pattern: str) -> None:
    before = {name: tensor.numpy() for name, tensor in logical_tensors(seed_of(start(False))).items()}
    one, after = single(pattern, False).snapshots[1].weights, single(pattern, False).snapshots[STEPS].weights
    among_all = single("", False).snapshots[1].weights
    moved = 0
    for name, tensor in after.items():
        if re.search(pattern, name):
            moved += 1
            assert not numpy.array_equal(tensor, of_layer(before, name)), name
            assert numpy.array_equal(one[name], of_layer(among_all, name)), name
        else:
            assert numpy.array_equal(tensor, of_layer(before, name)), name
    assert 0 < moved < len(after)


def seed_of(line: list[str]) -> Path:
    """Return the checkpoint that a command line loads."""
    return Path(line[line.index("--load") + 1]) / "iter_0000001"


def of_layer(stacked: Mapping[str, Any], name: str) -> Any:
    """Return a layer's tensor from where layers are stacked."""
    found = re.fullmatch(r"(.*layers\.)(\d+)\.(.*)", name)
    return stacked[name] if found is None else stacked[found[1] + found[3]][int(found[2])]


# Their neighbours prove them, too; -m slow runs them.
SLOW = {
    "the last layer, PP 4",
    "the first layer, virtual stages",
    "the first layer, selective recompute",
    "norms, DP 2",
    "the tied embedding, PP 2",
}


@pytest.mark.parametrize(
    ("pattern", "world", "layout", "tied"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in LAYOUTS.items()],
)
def test_layout_equals_one_process_in_float64(
    ranks: RankPool, start: Start, single: Train, pattern: str, world: int, layout: str, tied: bool
) -> None:
    reference = single(pattern, tied)
    run = run_arm(
        ranks,
        "O",
        world,
        [*start(tied), *flags(layout), "--train-only", pattern],
        float64=True,
        snapshots=(STEPS,),
    )
    for a, b in zip(run.curve, reference.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=RELATIVE)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=RELATIVE)
    ours, theirs = run.snapshots[STEPS].weights, reference.snapshots[STEPS].weights
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert numpy.linalg.norm(ours[name] - tensor) <= 10 * RELATIVE * numpy.linalg.norm(tensor), name


@pytest.mark.parametrize(
    "layout", [f"{PP2} --use-distributed-optimizer {RESHARDABLE}", f"--use-distributed-optimizer {RESHARDABLE}"]
)
def test_is_saved_and_resumed(ranks: RankPool, start: Start, tmp_path: Path, layout: str) -> None:
    line = [*start(False), *flags(layout), "--train-only", LAST]
    whole = run_arm(ranks, "O", 2, line, tmp_path / "whole", float64=True)
    run_arm(ranks, "O", 2, [*line, *flags("--exit-interval 1")], tmp_path / "half", float64=True)
    again = [*flags(TINY, layout, f"--train-iters {STEPS} --clip-grad 0"), "--train-only", LAST]
    resumed = run_arm(ranks, "O", 2, [*again, "--load", str(tmp_path / "half")], tmp_path / "again", float64=True)
    assert resumed.curve == whole.curve[1:]
    one, other = logical_tensors(whole.checkpoint(STEPS)), logical_tensors(resumed.checkpoint(STEPS))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    states = {name.partition(".exp_avg.")[2] for name in one if ".exp_avg." in name}
    assert states and all(re.search(LAST, name) for name in states)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"layers\.4\.", r"--train-only layers\.4\.: found in no parameter's name, so nothing would be trained"),
        (".", "--train-only .: found in every parameter's name, so nothing would be frozen"),
        ("(", "--train-only (: missing ), unterminated subpattern"),
    ],
)
def test_all_or_nothing_is_refused(ranks: RankPool, pattern: str, message: str) -> None:
    with pytest.raises(RankFailure) as failure:
        run_arm(ranks, "O", 2, [*flags(TINY, PP2), "--train-only", pattern])
    assert message in str(failure.value)
