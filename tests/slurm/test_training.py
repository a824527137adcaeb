"""A real training in a slurm job: asked to stop, requeued, and resumed where it stopped."""

import json
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


def submit_preflight(run: SlurmRun) -> SlurmRun:
    """Submit a job that checks the launch of a training on two nodes with one rank each."""
    own = flags(TINY, "--pipeline-model-parallel-size 2 --train-iters 3 --exit-signal-handler")
    own += ["--save", str(run.folder / "checkpoints"), "--load", str(run.folder / "checkpoints")]
    script = str(ROOT / "examples/pretrain_gpt.py")
    # The name of either node of the tests is a loopback address, which the preflight refuses without this.
    env = {"GLOO_SOCKET_IFNAME": "lo"}
    return run.submit(*own, options=("--preflight",), script=script, per_node=1, cwd=run.folder / "marks", **env)


@pytest.mark.slow
def test_preflight_of_a_job_checks_all_nodes(slurm_run: Callable[[ClusterKind], SlurmRun]) -> None:
    run = submit_preflight(slurm_run(ClusterKind("linuxproc")))
    assert run.wait_state("COMPLETED", "FAILED", seconds=LIMIT_S) == "COMPLETED", run.output()
    report = json.loads((run.run_dir / "start-0/preflight.json").read_text())
    found = {one["check"]: one for one in report["findings"]}
    assert report["passed"]
    assert found["meeting point"]["result"] == found["checkpoint folder"]["result"] == "ok"
    assert "on all 2 ranks" in found["code"]["detail"]
    assert "2 node(s)" in found["upstream"]["detail"]
    assert "preflight: all checks passed" in run.output()
    assert not re.search(r"iteration +1/", run.output()), "it does not train"


@pytest.mark.slow
@pytest.mark.parametrize("proctrack", ["pgid", "linuxproc"])
def test_scancel_during_a_preflight_ends_the_job(slurm_run: Callable[[ClusterKind], SlurmRun], proctrack: str) -> None:
    run = submit_preflight(slurm_run(ClusterKind(proctrack)))
    wait_until(lambda: len(list(run.run_dir.glob("start-0/ranks/rank-*.log"))) == 2, "both ranks run", LIMIT_S)
    run.cluster.call("scancel", str(run.id))
    run.wait_empty(20)
    assert run.wait_state("CANCELLED") and run.restarts() == 0
