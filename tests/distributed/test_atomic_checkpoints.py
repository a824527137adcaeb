"""A save that is killed loses nothing, a changed bit is noticed, and no state that is not finite is saved."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.flags import SHALLOW, TINY, flags
from tests.distributed.script_variants import KILLED_WHILE_SAVING
from tests.pool import RankFailure, RankPool
from tests.regression.arm import Arm, run_arm
from tests.regression.tensors import logical_tensors

VARIANTS = "tests.distributed.script_variants"
PARO = "--paro IIG --paro-group-size 1 --overlap-grad-reduce --overlap-param-gather"
SAVES = f"{TINY} {SHALLOW} --train-iters 3 --save-interval 1 {PARO}"
LEFT = {"name": 2, "tracker": 2}  # the checkpoint that is complete after a stop at that point; otherwise the first one
NAMES = {
    "tensors": "killed_in_tensors",
    "list": "killed_before_list",
    "description": "killed_before_description",
    "manifest": "killed_in_manifest",
    "name": "killed_before_name",
    "tracker": "killed_in_tracker",
}


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[pytest.mark.slow] * (point != "tracker")) for point in KILLED_WHILE_SAVING]
)
def test_a_save_killed_at_any_point_loses_nothing(ranks: RankPool, tmp_path: Path, point: str) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    line = [*flags(SAVES), "--load", str(killed)]
    with pytest.raises(RankFailure, match=r"died without an error message|raised"):
        run_arm(ranks, "O", 2, line, killed, float64=True, mutant=f"{VARIANTS}:{NAMES[point]}")
    assert (killed / "iter_0000001").is_dir()  # it was killed in its second save, not before
    undisturbed = run_arm(ranks, "O", 2, flags(SAVES), whole, float64=True)
    resumed = run_arm(ranks, "O", 2, line, killed, float64=True)
    assert resumed.curve == undisturbed.curve[LEFT.get(point, 1) :]
    one, other = (logical_tensors(folder / "iter_0000003") for folder in (killed, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_bit_that_flips_on_the_way_to_the_disk_is_noticed(ranks: RankPool, tmp_path: Path) -> None:
    """The file is consistent in itself: only the state that was in memory tells."""
    line = [*flags(SAVES, "--exit-interval 2"), "--load", str(tmp_path)]
    run = run_arm(ranks, "O", 2, line, tmp_path, mutant=f"{VARIANTS}:flipped_bit_on_the_way_to_the_disk")
    assert run.planted and (tmp_path / "iter_0000002").is_dir()
    resumed = run_arm(ranks, "O", 2, [*flags(SAVES), "--load", str(tmp_path)])
    assert [step["iteration"] for step in resumed.curve] == [2, 3]
    log = (ranks.logs / f"job{ranks.jobs:03d}-rank0.log").read_text()
    assert "iter_0000002/__1_0.distcp is damaged: optimizer.state.exp_avg_sq." in log
    assert "differs from what was saved" in log and "iter_0000001 is loaded instead." in log
    trusting = run_arm(ranks, "O", 2, [*flags(SAVES, "--ckpt-verify sizes"), "--load", str(tmp_path)])
    assert [step["iteration"] for step in trusting.curve] == [3]


def test_a_state_that_is_not_finite_is_not_saved(ranks: RankPool, tmp_path: Path) -> None:
    nan = f"{VARIANTS}:nan_in_the_second_save"
    message = r"iter_0000002 is not saved, because .* are not finite: rank 1: optimizer.state.exp_avg_sq\..* is nan"
    with pytest.raises(RankFailure, match=f"NonFiniteState: .*{message}"):
        run_arm(ranks, "O", 2, flags(SAVES), tmp_path, mutant=nan)
    assert [path.name for path in sorted(tmp_path.glob("iter_*"))] == ["iter_0000001"]
    run = run_arm(ranks, "O", 2, flags(SAVES, "--ckpt-non-finite skip"), tmp_path / "skip", mutant=nan)
    assert [step["iteration"] for step in run.curve] == [1, 2, 3]
    log = (ranks.logs / f"job{ranks.jobs:03d}-rank0.log").read_text()
    assert "is nan. The checkpoints saved before are unchanged." in log and "--ckpt-non-finite skip to" not in log
    assert [path.name[-1] for path in sorted((tmp_path / "skip").glob("iter_*"))] == ["1", "3"]


@pytest.mark.parametrize("arm", ["O", pytest.param("U", marks=pytest.mark.slow)])
def test_loading_runs_no_code_from_the_file(ranks: RankPool, tmp_path: Path, arm: Arm) -> None:
    """Upstream alone runs it."""
    line = flags(TINY, SHALLOW, "--train-iters 2 --exit-interval 1")
    run_arm(ranks, arm, 1, line, tmp_path / "saved", mutant=f"{VARIANTS}:code_in_the_checkpoint")
    shutil.rmtree(tmp_path / "saved/created-by-code")  # upstream copies the object as it saves, which runs its code
    resume = [*flags(TINY, SHALLOW, "--train-iters 2"), "--load", str(tmp_path / "saved")]
    if arm == "U":
        run_arm(ranks, arm, 1, resume)
    else:
        with pytest.raises(RankFailure, match=r"common_state.* is not loaded, .* it names os\.makedirs"):
            run_arm(ranks, arm, 1, resume)
    assert (tmp_path / "saved/created-by-code").exists() == (arm == "U")


BACKGROUND = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"


@pytest.mark.slow
@pytest.mark.parametrize("own", [PARO, "--paro NNG --paro-group-size 2", "--use-distributed-optimizer"])
def test_a_background_save_is_committed_when_it_is_written(ranks: RankPool, tmp_path: Path, own: str) -> None:
    """It holds the state of its step, although training goes on while it is written."""
    line = flags(SAVES.replace(PARO, own))
    whole = run_arm(ranks, "O", 2, line, tmp_path / "whole")
    behind = run_arm(
        ranks, "O", 2, [*line, *flags(BACKGROUND)], tmp_path / "behind", mutant=f"{VARIANTS}:watched_commits"
    )
    assert behind.planted and behind.curve == whole.curve
    assert {path.name for path in behind.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}
    for step in (1, 2, 3):
        one, other = (logical_tensors(run.checkpoint(step)) for run in (whole, behind))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    resumed = run_arm(ranks, "O", 2, [*line, "--load", str(behind.folder), "--ckpt-step", "2"])
    assert resumed.curve == whole.curve[2:]


@pytest.mark.slow
def test_a_second_save_of_a_step_waits_for_the_first(ranks: RankPool, tmp_path: Path) -> None:
    """Upstream saves a step again where its schedule of batch sizes goes on, or where a result was not finite."""
    schedule = "--train-iters 4 --save-interval 2 --step-batch-size-schedule 0:4,512:8"  # in tokens: after two steps
    line = flags(SAVES.replace("--global-batch-size 8", ""), BACKGROUND, schedule)
    run = run_arm(ranks, "O", 2, line, tmp_path / "saved", mutant=f"{VARIANTS}:saves_that_end_late")
    assert len(run.curve) == 4 and run.planted
    assert {path.name[:6] for path in (tmp_path / "saved").iterdir()} == {"iter_0", "latest"}
    resumed = run_arm(ranks, "O", 2, [*line, "--load", str(tmp_path / "saved"), "--ckpt-step", "2"])
    assert resumed.curve == run.curve[2:]


@pytest.mark.slow
def test_a_rank_killed_while_a_save_is_written_loses_nothing(ranks: RankPool, tmp_path: Path) -> None:
    line = [*flags(SAVES, BACKGROUND), "--load", str(tmp_path / "killed")]
    with pytest.raises(RankFailure, match=r"died without an error message|raised"):
        run_arm(ranks, "O", 2, line, tmp_path / "killed", mutant=f"{VARIANTS}:killed_behind_the_second_save")
    assert not (tmp_path / "killed/iter_0000002").exists() and (tmp_path / "killed/saving_iter_0000002").exists()
    resumed = run_arm(ranks, "O", 2, line, tmp_path / "killed")
    assert [step["iteration"] for step in resumed.curve] == [2, 3]
    assert {path.name[:6] for path in (tmp_path / "killed").iterdir()} == {"iter_0", "latest"}


@pytest.mark.slow
def test_a_dead_background_writer_ends_the_run(ranks: RankPool, tmp_path: Path) -> None:
    """Upstream would wait for it without a limit."""
    with pytest.raises(RankFailure, match=r"died without an error message|raised"):
        run_arm(ranks, "O", 2, flags(SAVES, BACKGROUND), tmp_path, mutant=f"{VARIANTS}:killed_background_writer")
    log = (ranks.logs / f"job{ranks.jobs:03d}-rank1.log").read_text()
    assert "the process that writes checkpoints in the background (pid " in log and "ended with signal 9" in log
    assert not (tmp_path / "iter_0000002").exists()
