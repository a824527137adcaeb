"""Save, resume, and load into another layout: upstream's checkpoints, on CPU."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.equality import RELATIVE, assert_steps_equal
from tests.distributed.flags import SHALLOW, TINY, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors

TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer"
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
HALF, WHOLE = 2, 4
STEPS = f"{TINY} {SHALLOW} --global-batch-size 4 --train-iters {WHOLE} --save-interval {HALF}"


@dataclass(frozen=True)
class Halves:
    """The uninterrupted run to compare with, and the checkpoint to start from.

    Attributes:
        undisturbed: trained without a break.
        stopped: folder of checkpoints of a run that stopped half-way.
    """

    undisturbed: Run
    stopped: Path


@pytest.fixture(scope="module")
def halves(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Halves]:
    """Return a function that trains two ranks in a layout (once per layout): without a break, and half-way."""

    @functools.cache
    def train(layout: str) -> Halves:
        base, folder = flags(STEPS, layout), tmp_path_factory.mktemp("halves")
        undisturbed = run_arm(ranks, "O", 2, base, folder / "undisturbed", float64=True)
        run_arm(ranks, "O", 2, [*base, "--exit-interval", str(HALF)], folder / "stopped", float64=True)
        return Halves(undisturbed, folder / "stopped")

    return train


def resume(ranks: RankPool, stopped: Path, folder: Path, layout: str, world: int = 2) -> Run:
    """Resume a run in the same layout or in another one."""
    return run_arm(ranks, "O", world, [*flags(STEPS, layout), "--load", str(stopped)], folder, float64=True)


def distances(one: Path, other: Path) -> dict[str, float]:
    """Return the relative distance of every logical tensor of two checkpoints."""
    a, b = logical_tensors(one), logical_tensors(other)
    assert a.keys() == b.keys()
    return {name: float((a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-300)) for name in a}


@pytest.mark.parametrize(
    "sharding",
    [
        pytest.param([], id="dp_reshardable", marks=pytest.mark.slow),
        pytest.param([RESHARDABLE], id="fully_reshardable"),
    ],
)
def test_distributed_optimizer_resumes_exactly(
    ranks: RankPool, halves: Callable[[str], Halves], tmp_path: Path, sharding: list[str]
) -> None:
    layout = " ".join([DISTRIBUTED_OPTIMIZER, *sharding])
    undisturbed = halves(layout).undisturbed
    resumed = resume(ranks, halves(layout).stopped, tmp_path, layout)
    assert resumed.curve == undisturbed.curve[HALF:]
    one, other = logical_tensors(undisturbed.checkpoint(WHOLE)), logical_tensors(resumed.checkpoint(WHOLE))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_distributed_optimizer_resumes_from_a_file_of_its_own(ranks: RankPool, tmp_path: Path) -> None:
    base = flags(STEPS, DISTRIBUTED_OPTIMIZER, "--ckpt-format torch --train-iters 3 --save-interval 2")
    undisturbed = run_arm(ranks, "O", 2, base, tmp_path / "whole")
    run_arm(ranks, "O", 2, [*base, "--exit-interval", "2"], tmp_path / "stopped")
    resumed = run_arm(ranks, "O", 2, [*base, "--load", str(tmp_path / "stopped")])
    assert resumed.curve == undisturbed.curve[2:]


@pytest.mark.slow
def test_plain_optimizer_resumes_exactly(ranks: RankPool, halves: Callable[[str], Halves], tmp_path: Path) -> None:
    undisturbed, resumed = halves(PP).undisturbed, resume(ranks, halves(PP).stopped, tmp_path, PP)
    assert resumed.curve == undisturbed.curve[HALF:]
    assert max(distances(undisturbed.checkpoint(WHOLE), resumed.checkpoint(WHOLE)).values()) == 0


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        *(pytest.param(world, layout, marks=pytest.mark.slow) for world, layout in ((2, TP), (2, PP), (4, PP))),
        (4, f"{TP} {PP}"),
    ],
    ids=["TP 2", "PP 2", "PP 2 x DP 2", "TP 2 x PP 2"],
)
def test_checkpoint_loads_into_another_layout(
    ranks: RankPool,
    halves: Callable[[str], Halves],
    tmp_path: Path,
    world: int,
    layout: str,
    tell: Callable[[str], None],
) -> None:
    both = f"{DISTRIBUTED_OPTIMIZER} {RESHARDABLE}"
    undisturbed = halves(both).undisturbed
    resumed = resume(ranks, halves(both).stopped, tmp_path, f"{both} {layout}", world)
    assert_steps_equal(resumed.curve, undisturbed.curve[HALF:])
    apart = distances(resumed.checkpoint(WHOLE), undisturbed.checkpoint(WHOLE))
    tell(f"checkpoint of DP 2 resumed on {world} ranks, {layout}: largest tensor distance {max(apart.values()):.1e}")
    assert max(apart.values()) < 10 * RELATIVE


@pytest.mark.slow  # as test_sharding_refused_checkpoints.py has it for ours
def test_bound_optimizer_state_is_refused_in_another_layout(ranks: RankPool, halves: Callable[[str], Halves]) -> None:
    """Upstream cannot load optimizer states of format `dp_reshardable` into another layout."""
    stopped = halves(DISTRIBUTED_OPTIMIZER).stopped
    with pytest.raises(RankFailure, match="reshardable"):
        run_arm(ranks, "O", 2, [*flags(STEPS, DISTRIBUTED_OPTIMIZER, PP), "--load", str(stopped)], float64=True)
