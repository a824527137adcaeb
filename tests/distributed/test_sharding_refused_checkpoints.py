"""Checkpoints that sharding cannot load are refused by name, and a save that is killed leaves the previous one."""

from pathlib import Path

import pytest

from tests.distributed.flags import OVERLAP, TINY, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import run_arm
from tests.regression.tensors import logical_tensors

ONE = f"{TINY} --train-iters 3 --exit-interval 1"
MORE = f"{TINY} --train-iters 3"
BUCKETS = "--ddp-bucket-size 20000"
RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
PARO = "--paro IIG --paro-group-size 1 --overlap-grad-reduce --overlap-param-gather"


@pytest.mark.parametrize(
    ("layout", "saver"),
    [
        (
            "--use-distributed-optimizer",
            "upstream's distributed optimizer, DP 2, TP 1, PP 1, with .* as dp_reshardable",
        ),
        pytest.param(
            *("", "upstream's plain optimizer, DP 2, TP 1, PP 1, with optimizer states in full on every rank"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dp_reshardable", "plain"],
)
def test_bound_optimizer_states_are_refused(ranks: RankPool, tmp_path: Path, layout: str, saver: str) -> None:
    run_arm(ranks, "U", 2, flags(ONE, layout), tmp_path)
    line = [*flags(MORE, PARO), "--load", str(tmp_path)]
    refusal = rf"iter_0000001 was saved by {saver}.*; this run is --paro IIG in 2 group\(s\) of 1, DP 2, TP 1, PP 1"
    with pytest.raises(RankFailure, match=f"{refusal} .*--no-load-optim"):
        run_arm(ranks, "O", 2, line)
    run = run_arm(ranks, "O", 2, [*line, "--no-load-optim"])
    assert [step["iteration"] for step in run.curve] == [2, 3]


def test_states_that_upstream_has_mixed_up_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    """With upstream only, the same step saved from several padded buckets differs from that saved from one."""
    one, several = tmp_path / "one", tmp_path / "several"
    run_arm(ranks, "U", 2, flags(ONE, RESHARDABLE), one, float64=True)
    run_arm(ranks, "U", 2, flags(ONE, RESHARDABLE, OVERLAP, BUCKETS), several, float64=True)
    right, wrong = (logical_tensors(folder / "iter_0000001") for folder in (one, several))
    mixed_up = [name for name in right if (right[name] - wrong[name]).norm() > 0.01 * right[name].norm()]
    assert mixed_up and all(name.startswith("optimizer.state.") for name in mixed_up)
    message = r"optimizer states of .* do not match the weights in the checkpoint: .*issue 504"
    with pytest.raises(RankFailure, match=message):
        run_arm(ranks, "O", 2, [*flags(MORE, PARO), "--load", str(several)], float64=True)
