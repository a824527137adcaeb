"""After `kill -9` of a rank, the launcher names it, no process is left, and the run resumes without a difference."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from examples import loss_curve
from tests.distributed.flags import SHALLOW, TINY, flags

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVED = 9, 3


def training(folder: Path) -> list[str]:
    """Return the flags of two pipeline ranks with data workers that save every three steps and resume."""
    own = flags(f"--pipeline-model-parallel-size 2 --train-iters {STEPS} --save-interval {SAVED} --log-interval 1")
    own += flags(SHALLOW, "--seq1f1b-splits 2 --exit-signal-handler --num-workers 2")
    folders = ["--save", folder / "checkpoints", "--load", folder / "checkpoints", "--tensorboard-dir", folder / "tb"]
    return [*flags(TINY), *own, *map(str, folders)]


def launch(folder: Path) -> subprocess.Popen[str]:
    """Start the ranks through the launcher."""
    command = ["bash", "scripts/launch.sh", "--local", "--nproc", "2", "--run-dir", folder]
    command += ["--", "examples/pretrain_gpt.py", *training(folder)]
    environment = {**os.environ, "VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path) -> None:
    """Train to the end."""
    process = launch(folder)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]


def ranks_of(folder: Path) -> list[psutil.Process]:
    """Return the living processes whose command line names the run's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(folder) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def training_rank(folder: Path, rank: int) -> psutil.Process:
    """Return the process of one rank of the run, not one of its data workers, which have the same command."""
    processes = ranks_of(folder)
    alike = {one.pid for one in processes if "patches" in one.cmdline() and one.environ().get("RANK") == str(rank)}
    (leader,) = [one for one in processes if one.pid in alike and one.ppid() not in alike]
    return leader


@pytest.mark.slow
def test_killed_rank_is_named_and_the_run_resumes(tmp_path: Path, tell: Callable[[str], None]) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    finish(undisturbed)

    process = launch(disturbed)
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if re.search(rf"iteration +{SAVED + 2}/", line):
            break
    victim = training_rank(disturbed, 1)
    everyone = {p.pid for leader in ranks_of(disturbed) for p in [leader, *leader.children(recursive=True)]}
    started = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    rest, _ = process.communicate(timeout=400)
    output += rest
    tell(f"kill -9 of a rank: the launcher ended {time.monotonic() - started:.1f} s later")
    assert process.returncode != 0
    assert re.search(rf"rank 1 \(host \S+, pid {victim.pid}\) died of signal 9 \(SIGKILL\)", output), output[-3000:]
    left = [pid for pid in everyone if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert not left and not ranks_of(disturbed)
    # On a busy machine the kill may come one checkpoint later.
    saved = int((disturbed / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved % SAVED == 0 and 0 < saved < STEPS

    finish(disturbed)
    (log,) = (disturbed / "start-1/ranks").glob("rank-00000-*.log")
    assert f"at iteration {saved}" in log.read_text()
    expected, got = loss_curve.read(undisturbed / "tb").train, loss_curve.read(disturbed / "tb").train
    assert [step for step, _ in got] == list(range(1, STEPS + 1))
    assert got == expected
