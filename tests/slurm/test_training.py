"""A real training in a slurm job: asked to stop, requeued, and resumed where it stopped."""

import re
from collections.abc import Callable

import pytest

from megatron.longseq.runlog.folder import RunFolder
from tests.distributed.flags import TINY, flags
from tests.slurm.bed import ROOT, SlurmRun
from tests.slurm.cluster import ClusterKind, wait_until

LIMIT_S = 300.0  # for two ranks to import torch and Megatron on a busy machine


@pytest.mark.slow
def test_training_is_requeued_and_resumes(slurm_run: Callable[[ClusterKind], SlurmRun]) -> None:
    run = slurm_run(ClusterKind("linuxproc"))
    own = flags("--pipeline-model-parallel-size 2 --train-iters 1000000 --log-interval 1 --seq1f1b-splits 2")
    own += [
        "--save",
        str(run.folder / "checkpoints"),
        "--load",
        str(run.folder / "checkpoints"),
        "--exit-signal-handler",
    ]
    run.submit(*flags(TINY), *own, script=str(ROOT / "examples/pretrain_gpt.py"), per_node=1, cwd=run.folder / "marks")
    assert "note:" not in run.said, "the script is copied, and all flags are there"
    wait_until(lambda: re.search(r"iteration +3/", run.output()) is not None, "step 3", LIMIT_S)
    run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.id))
    wait_until(lambda: run.restarts() == 1, "the job is requeued", LIMIT_S)
    run.begin_requeued()
    saved = run.saved()
    assert saved >= 3
    first = rf"iteration +{saved + 1}/"
    wait_until(lambda: len(re.findall(first, run.output())) == 1, f"step {saved + 1} follows", LIMIT_S)
    log = (run.run_dir / "start-1/ranks/rank-00000-127.0.0.11.log").read_text()
    assert f"at iteration {saved}" in log
    command = (run.run_dir / "start-1/command.sh").read_text()
    assert str(run.run_dir / "code/examples/pretrain_gpt.py") in command
    run.cluster.call("scancel", str(run.id))
    run.wait_empty(20)
    console = run.output().splitlines()
    assert next(number for number, line in enumerate(console, 1) if "iteration        1/" in line) <= 60
    record = RunFolder(run.run_dir)
    record.refresh()
    assert [start.steps[0]["iteration"] for start in record.starts] == [1, saved + 1]
    assert all(start.arguments["seq1f1b_splits"] == 2 for start in record.starts)
    steps = [int(step) for step in re.findall(r"iteration +(\d+)/", run.output())]
    assert steps[: saved + 1] == list(range(1, saved + 2)), "no step is missing, none is repeated"
