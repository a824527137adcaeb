"""What becomes of a job under a real slurm: signals, preemption, time limit, requeues, killed processes.

Every case runs under both ways in which slurm signals a step: `pgid` reaches the process group of a task, `linuxproc`
every process below it, as cgroups do. After every case no process of the job may be left.
"""

import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.slurm.bed import PER_NODE, RESUMABLE, ROOT, WORLD, SlurmRun
from tests.slurm.cluster import NODES, ClusterKind, wait_until

Prepare = Callable[..., SlurmRun]
KINDS = [
    pytest.param(ClusterKind("pgid"), id="pgid"),
    pytest.param(ClusterKind("linuxproc"), id="linuxproc", marks=pytest.mark.slow),
]
SLOW_KINDS = [pytest.param(ClusterKind(name), id=name, marks=pytest.mark.slow) for name in ("pgid", "linuxproc")]
END_S = 20.0  # everything ends within this time after TERM, in seconds


def resumes(run: SlurmRun) -> None:
    """Check that the job is requeued and continues at the step that it saved."""
    run.begin_requeued()
    saved = run.saved()
    assert saved > 0, run.output()
    run.wait_ranks(start=1)
    assert run.begun_at(1) == saved
    assert "requeued to continue at iteration" in run.output()


@pytest.mark.parametrize("kind", KINDS)
def test_usr1_chain_to_a_resumed_run(slurm_run: Prepare, kind: ClusterKind) -> None:
    run = slurm_run(kind).submit(*RESUMABLE)
    assert "note:" not in run.said.replace("note: train.py lies outside", "")
    run.wait_ranks()
    run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.id))
    resumes(run)
    for rank in range(WORLD):
        (log,) = run.run_dir.glob(f"start-0/ranks/rank-{rank:05d}-*.log")
        assert f"rank {rank} saved step" in log.read_text()


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_scancel_saves_and_ends_the_job(slurm_run: Prepare, kind: ClusterKind) -> None:
    run = slurm_run(kind).submit(*RESUMABLE)
    run.wait_ranks()
    run.cluster.call("scancel", str(run.id))
    run.wait_empty(END_S)
    assert run.wait_state("CANCELLED") and run.restarts() == 0
    assert run.saved() > 0


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_timed_signal_comes_before_the_limit(slurm_run: Prepare, kind: ClusterKind) -> None:
    # slurm counts limits in minutes, and sends the signal up to a minute early. So the limit comes near only when all
    # ranks run, however long they took to start.
    run = slurm_run(kind).submit(*RESUMABLE, options=("--slurm-arg", "--time=60", "--signal-seconds", "30"))
    run.wait_ranks()
    run.limit_from_now(1)
    wait_until(lambda: run.restarts() > 0, f"job {run.id} is requeued", 200)
    run.limit(60)
    resumes(run)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_term_during_a_save_lets_it_finish(slurm_run: Prepare, kind: ClusterKind) -> None:
    run = slurm_run(kind).submit(*RESUMABLE, "--save-seconds", "12", LONGSEQ_STOP_SECONDS="28")
    run.wait_ranks()
    run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.id))
    run.wait_mark("saving0-rank0")
    for _ in range(2):
        run.cluster.call("scancel", "--signal=TERM", str(run.id))  # as slurm does to the steps at the time limit
    resumes(run)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_time_limit_saves_and_ends_the_job(slurm_run: Prepare, kind: ClusterKind) -> None:
    # The ranks do not answer the signal; TERM at the limit must end everything.
    run = slurm_run(kind).submit("--deaf", options=("--slurm-arg", "--time=60", "--signal-seconds", "1"))
    run.wait_ranks()
    run.limit_from_now(0)
    assert run.wait_state("TIMEOUT", "COMPLETED", "FAILED", seconds=150) and run.restarts() == 0
    run.wait_empty(END_S)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_slow_save_is_waited_for(slurm_run: Prepare, kind: ClusterKind) -> None:
    run = slurm_run(kind).submit(*RESUMABLE, "--save-seconds", "40")
    run.wait_ranks()
    run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.id))
    resumes(run)


@pytest.mark.parametrize("has_user_signal", [False, True], ids=["term", "user-signal"])
@pytest.mark.parametrize("proctrack", ["pgid", "linuxproc"])
@pytest.mark.slow
def test_preemption_requeues(slurm_run: Prepare, proctrack: str, has_user_signal: bool) -> None:
    run = slurm_run(ClusterKind(proctrack, has_user_signal)).submit(*RESUMABLE)
    run.wait_ranks()
    words = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    other = run.cluster.call(*words, "--wrap=sleep 3").strip()
    try:
        resumes(run)
    finally:
        run.cluster.call("scancel", other, check=False)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_requeue_by_hand_resumes(slurm_run: Prepare, kind: ClusterKind) -> None:
    run = slurm_run(kind).submit(*RESUMABLE)
    run.wait_ranks()
    run.cluster.call("scontrol", "requeue", str(run.id))
    run.begin_requeued()
    run.wait_ranks(start=1)
    assert run.begun_at(1) == run.saved() > 0


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_without_a_new_checkpoint_it_is_not_requeued(slurm_run: Prepare, kind: ClusterKind) -> None:
    run = slurm_run(kind).submit("--exit-signal-handler")
    assert "the training has no --save" in run.said and "the training has no --load" in run.said
    run.wait_ranks()
    run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.id))
    run.wait_empty(END_S + 10)
    assert run.wait_state("COMPLETED", "FAILED") and run.restarts() == 0
    assert "not requeued, because the training has no --save" in run.output()


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_requeues_are_bounded(slurm_run: Prepare, kind: ClusterKind) -> None:
    run = slurm_run(kind).submit(*RESUMABLE, options=("--max-requeues", "1"))
    for start in range(2):
        run.wait_ranks(start)
        run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.id))
        if start == 0:
            run.begin_requeued()
    run.wait_empty(END_S + 10)
    assert run.wait_state("COMPLETED") and run.restarts() == 1
    assert "not requeued, because it was requeued 1 times" in run.output()


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_node_failure_resumes_when_the_node_is_back(slurm_run: Prepare, kind: ClusterKind) -> None:
    run = slurm_run(kind).submit(*RESUMABLE, "--save-at", "5")
    run.wait_ranks()
    wait_until(lambda: run.saved() == 5, "step 5 is saved")
    cluster = run.cluster
    cluster.kill_node(NODES[1])
    cluster.call("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    run.wait_empty(END_S)
    cluster.start_node(NODES[1])
    cluster.call("scontrol", "update", f"nodename={NODES[1]}", "state=resume", check=False)
    run.begin_requeued()
    run.wait_ranks(start=1)
    assert run.begun_at(1) >= 5


@pytest.mark.parametrize("kind", SLOW_KINDS)
@pytest.mark.parametrize("deaf", [False, True], ids=["", "deaf"])
def test_killed_rank_is_named_and_all_nodes_end(slurm_run: Prepare, kind: ClusterKind, deaf: bool) -> None:
    run = slurm_run(kind).submit(*(["--deaf"] if deaf else []))
    pids = run.wait_ranks()
    os.kill(pids[3], signal.SIGKILL)
    run.wait_empty(2 * END_S if deaf else END_S)
    assert run.wait_state("FAILED") and run.restarts() == 0
    last = run.output().rstrip().splitlines()[-3:]
    assert f"rank 3 (host {NODES[1]}, pid {pids[3]}) died of signal 9 (SIGKILL)" in "\n".join(last), run.output()
    assert run.field("ExitCode") == "1:0"


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_failing_rank_is_named_with_its_last_words(slurm_run: Prepare, kind: ClusterKind) -> None:
    run = slurm_run(kind).submit("--fail", "2")
    run.wait_ranks()
    run.wait_empty(END_S + 10)
    assert run.wait_state("FAILED") and run.restarts() == 0
    said = run.output()
    assert f"rank 2 (host {NODES[1]}" in said and "its last words: ValueError: bad batch" in said, said
    assert "[rank2 127.0.0.12]:about to fail" in said
    assert said.rstrip().splitlines()[-1].startswith("  its log: "), said
    assert "Signals.SIGTERM" not in said and "torch/distributed" not in said
    assert run.field("ExitCode") == "1:0"


@pytest.mark.parametrize("kind", SLOW_KINDS)
@pytest.mark.parametrize("victim", ["srun", "torchrun", "supervise.py", "keeper.py", "job.py"])
def test_whatever_is_killed_no_process_is_left(slurm_run: Prepare, kind: ClusterKind, victim: str) -> None:
    run = slurm_run(kind).submit("--deaf")
    run.wait_ranks()
    # srun is the first of its two processes: the other one only watches it.
    os.kill(min(run.named(victim)), signal.SIGKILL)
    run.wait_empty(2 * END_S)
    assert run.wait_state("FAILED") and run.restarts() == 0


@pytest.mark.slow
def test_first_node_that_cannot_be_reached_is_one_message(slurm_run: Prepare) -> None:
    run = slurm_run(ClusterKind()).submit(MASTER_ADDR="no.such.host.invalid")
    run.wait_empty(60)
    assert run.wait_state("FAILED")
    said = run.output()
    assert "the first node's name no.such.host.invalid does not resolve" in said
    assert len(said.splitlines()) < 6, said


@pytest.mark.slow
def test_requeued_job_runs_the_code_of_its_submission(slurm_run: Prepare) -> None:
    run = slurm_run(ClusterKind()).submit(*RESUMABLE)
    run.wait_ranks()
    command = (run.run_dir / "start-0/command.sh").read_text()
    assert str(run.run_dir / "code/scripts/lib/supervise.py") in command
    assert f"PYTHONPATH={run.run_dir / 'code'}" in command
    assert (run.run_dir / "code/megatron/longseq/pretrain_gpt.py").is_file()
    for name in ("environment.txt", "flags.txt", "revision.txt", "patches.json"):
        assert (run.run_dir / "start-0" / name).stat().st_size > 0
    assert not list(run.folder.glob("*.out")) and not list(run.folder.glob("*.log"))


def test_all_cores_of_the_nodes_are_asked_for(slurm_run: Prepare) -> None:
    run = slurm_run(ClusterKind()).submit(options=("--slurm-arg", "--hold"))
    assert run.field("OverSubscribe") == "NO", "whole nodes"
    run.cluster.call("scancel", str(run.id))
    some = slurm_run(ClusterKind()).submit(options=("--slurm-arg=--hold", "--slurm-arg=--cpus-per-task=3"))
    assert some.field("CPUs/Task") == "3" and some.field("OverSubscribe") != "NO"


@pytest.mark.slow
def test_another_step_of_the_job_keeps_neither_cores_nor_memory(slurm_run: Prepare) -> None:
    """A step has taken all memory of the job, as the shell of `srun --pty bash` does. The script is the user's own."""
    run = slurm_run(ClusterKind())
    command = f"bash {ROOT}/scripts/launch.sh --nproc {PER_NODE} --run-dir run -- train.py --steps 3"
    lines = ("#!/bin/bash", "srun --nodes=1 --ntasks=1 sleep 60 &", "sleep 2", command)
    (run.folder / "job.sh").write_text("\n".join(lines))
    words = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--output=run/slurm-%j.out", "job.sh"]
    (run.folder / "run").mkdir()
    done = subprocess.run(words, cwd=run.folder, env=run.env(), capture_output=True, text=True, check=True)
    run.id = int(done.stdout)
    run.wait_ranks()
    wait_until(lambda: "the training has ended" in run.output(), "the training ends")


@pytest.mark.slow
def test_a_request_before_a_node_has_begun_is_kept(slurm_run: Prepare) -> None:
    run = slurm_run(ClusterKind()).submit(*RESUMABLE)
    wait_until((run.run_dir / "start-0").exists, "the job begins")
    run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.id))
    wait_until(lambda: "requeued to continue at iteration" in run.output(), "it saves and is requeued")
