"""Save, resume, and load into another layout: upstream's checkpoints, on CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed.flags import TINY, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Run, run_arm
from tests.regression.tensors import logical_tensors

TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer"
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
HALF, WHOLE = 3, 6


def half_then_whole(
    ranks: RankPool, folder: Path, layout: str, other: str | None = None, worlds: tuple[int, int] = (2, 2)
) -> tuple[Run, Run]:
    """Train without a break; then again with a stop half-way and a resume, in another layout if one is given."""
    base = flags(TINY, f"--train-iters {WHOLE} --save-interval {HALF}")
    undisturbed = run_arm(ranks, "O", worlds[0], base + flags(layout), folder / "undisturbed", float64=True)
    stop = [*base, *flags(layout, f"--exit-interval {HALF}")]
    run_arm(ranks, "O", worlds[0], stop, folder / "resumed", float64=True)
    again = [*base, *flags(layout if other is None else other), "--load", str(folder / "resumed")]
    return undisturbed, run_arm(ranks, "O", worlds[1], again, folder / "resumed", float64=True)


def distances(one: Path, other: Path) -> dict[str, float]:
    """Return the relative distance of every logical tensor of two checkpoints."""
    a, b = logical_tensors(one), logical_tensors(other)
    assert a.keys() == b.keys()
    return {name: float((a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-300)) for name in a}


@pytest.mark.parametrize("sharding", ["", RESHARDABLE], ids=["dp_reshardable", "fully_reshardable"])
def test_distributed_optimizer_resumes_exactly(ranks: RankPool, tmp_path: Path, sharding: str) -> None:
    undisturbed, resumed = half_then_whole(ranks, tmp_path, f"{DISTRIBUTED_OPTIMIZER} {sharding}")
    assert resumed.curve == undisturbed.curve[HALF:]
    one, other = logical_tensors(undisturbed.checkpoint(WHOLE)), logical_tensors(resumed.checkpoint(WHOLE))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_plain_optimizer_resumes_exactly(ranks: RankPool, tmp_path: Path) -> None:
    undisturbed, resumed = half_then_whole(ranks, tmp_path, PP)
    assert resumed.curve == undisturbed.curve[HALF:]
    assert max(distances(undisturbed.checkpoint(WHOLE), resumed.checkpoint(WHOLE)).values()) == 0


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, TP), (2, PP), (4, f"{PP}"), (4, f"{TP} {PP}")],
    ids=["TP 2", "PP 2", "PP 2 x DP 2", "TP 2 x PP 2"],
)
def test_checkpoint_loads_into_another_layout(
    ranks: RankPool, tmp_path: Path, world: int, layout: str, tell: Callable[[str], None]
) -> None:
    both = f"{DISTRIBUTED_OPTIMIZER} {RESHARDABLE}"
    undisturbed, resumed = half_then_whole(ranks, tmp_path, both, f"{both} {layout}", (2, world))
    for ours, theirs in zip(resumed.curve, undisturbed.curve[HALF:], strict=True):
        assert ours["samples"] == theirs["samples"]
        assert abs(ours["loss"] / theirs["loss"] - 1) < 1e-9
        assert abs(ours["grad_norm"] / theirs["grad_norm"] - 1) < 1e-9
    apart = distances(resumed.checkpoint(WHOLE), undisturbed.checkpoint(WHOLE))
    tell(f"checkpoint of DP 2 resumed on {world} ranks, {layout}: largest tensor distance {max(apart.values()):.1e}")
    assert max(apart.values()) < 1e-8


def test_bound_optimizer_state_is_refused_in_another_layout(ranks: RankPool, tmp_path: Path) -> None:
    """What upstream cannot: optimizer state bound to one layout (`dp_reshardable`) goes into no other."""
    base = flags(TINY, f"--train-iters {WHOLE} --save-interval {HALF} {DISTRIBUTED_OPTIMIZER}")
    run_arm(ranks, "O", 2, [*base, *flags(f"--exit-interval {HALF}")], tmp_path)
    with pytest.raises(RankFailure, match="reshardable"):
        run_arm(ranks, "O", 2, [*base, *flags(PP), "--load", str(tmp_path)], None)
