"""Submit jobs to the cluster of the tests through the launcher, and look at what becomes of them.

The training is a script of a few lines, because these tests are about processes. The launcher, torchrun and slurm are
the real ones.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.slurm.cluster import Cluster, is_alive, processes_with, wait_until

ROOT = Path(os.environ.get("LONGSEQ_TEST_LAUNCHER_ROOT", Path(__file__).parents[2]))
NODES, PER_NODE = 2, 2
WORLD = NODES * PER_NODE

# Stands for `python -m patches` in the folder of the job.
PATCHES = """
import runpy, sys
if sys.argv[1] == "list":
    print("[]")
else:
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Upstream's behaviour in short: TERM sets a flag, which is looked at after each step; then all save and exit.
TRAINING = """
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("--save", "--load", "--steps", "--save-seconds", "--save-at", "--fail"):
    parser.add_argument(name, default="")
parser.add_argument("--exit-signal-handler", action="store_true")
parser.add_argument("--deaf", action="store_true")
options = parser.parse_args()
rank, start = int(os.environ["RANK"]), os.environ.get("SLURM_RESTART_COUNT", "0")
stop = []
if options.exit_signal_handler:
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
elif options.deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder = pathlib.Path(options.save or "nowhere")
tracker = folder / "latest_checkpointed_iteration.txt"
step = int(tracker.read_text()) if options.load and tracker.exists() else 0
mark = pathlib.Path("marks") / f"start{start}-rank{rank}"
mark.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), "step": step, "code": sys.argv[0]}))
mark.with_suffix(".new").rename(mark)
print("rank", rank, "begins at step", step, flush=True)
while options.fail == str(rank) and len(list(mark.parent.glob(f"start{start}-rank?"))) < 4:
    time.sleep(0.1)
if options.fail == str(rank):
    print("about to fail", flush=True)
    raise ValueError("bad batch")

def save():
    pathlib.Path("marks", f"saving{start}-rank{rank}").touch()
    time.sleep(float(options.save_seconds or 0))
    if rank == 0:
        done = folder / f"iter_{step:07d}"
        done.mkdir(parents=True, exist_ok=True)
        (done / "metadata.json").write_text("{}")
        tracker.write_text(str(step))
    print("rank", rank, "saved step", step, flush=True)

while not stop and step < int(options.steps or 100000):
    time.sleep(0.1)
    step += 1
    if options.save_at == str(step):
        save()
if options.save:
    save()
"""
RESUMABLE = ("--save", "checkpoints", "--load", "checkpoints", "--exit-signal-handler")


class SlurmRun:
    """One job in a folder of its own.

    Args:
        cluster: where it runs.
        folder: the current folder of the launcher.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run_dir = folder / "run"
        self.marker = f"LONGSEQ_TEST_RUN={secrets.token_hex(8)}"
        (folder / "patches").mkdir()
        (folder / "patches/__init__.py").touch()
        (folder / "patches/__main__.py").write_text(PATCHES)
        (folder / "marks").mkdir()
        (folder / "train.py").write_text(TRAINING)
        self.id = 0
        self.said = ""

    def env(self, **extra: str) -> dict[str, str]:
        name, _, value = self.marker.partition("=")
        own = {"VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", name: value}
        return {**self.cluster.env, **own, **extra}

    def submit(
        self,
        *arguments: str,
        options: tuple[str, ...] = (),
        script: str = "train.py",
        per_node: int = PER_NODE,
        cwd: Path | None = None,
        **env: str,
    ) -> "SlurmRun":
        """Submit the job through the launcher.

        Args:
            arguments: of the training script.
            options: further options of the launcher.
            script: the training script.
            per_node: ranks of each node.
            cwd: current folder; by default the one in which `python -m patches` is a stand-in.
            env: further environment variables.
        """
        words = ["bash", str(ROOT / "scripts/launch.sh"), "--slurm", "--nodes", str(NODES), "--nproc", str(per_node)]
        words += ["--run-dir", str(self.run_dir), *options, "--", script, *arguments]
        done = subprocess.run(
            words, cwd=cwd or self.folder, env=self.env(**env), capture_output=True, text=True, timeout=120, check=False
        )
        self.said = done.stdout + done.stderr
        assert done.returncode == 0, self.said
        found = re.search(r"Submitted batch job (\d+)", self.said)
        assert found is not None, self.said
        self.id = int(found[1])
        return self

    # What slurm says ---------------------------------------------------------------------------------------------

    def field(self, name: str) -> str:
        """Return one field of `scontrol show job`."""
        shown = self.cluster.call("scontrol", "show", "job", str(self.id))
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found is not None, shown
        return found[1]

    def state(self) -> str:
        return self.field("JobState")

    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def wait_state(self, *states: str, seconds: float = 90.0) -> str:
        """Wait until slurm says one of these."""
        try:
            wait_until(lambda: self.state() in states, f"job {self.id} becomes {states}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.state()}\n{self.output()}") from error
        return self.state()

    def wait_ranks(self, start: int = 0) -> dict[int, int]:
        """Wait until all ranks of a start run, and return their pids by rank."""
        files = {rank: self.folder / f"marks/start{start}-rank{rank}" for rank in range(WORLD)}
        try:
            wait_until(lambda: all(file.exists() for file in files.values()), f"ranks of start {start}")
        except AssertionError as error:
            raise AssertionError(f"{error}; the job is {self.state()}\n{self.output()}") from error
        return {rank: int(json.loads(file.read_text())["pid"]) for rank, file in files.items()}

    def wait_mark(self, name: str) -> None:
        wait_until((self.folder / "marks" / name).exists, f"{name}\n{self.output()}")

    def limit(self, minutes: int) -> None:
        """Set the time limit of the job, in minutes from its start."""
        self.cluster.call("scontrol", "update", f"jobid={self.id}", f"TimeLimit={minutes}")

    def limit_from_now(self, minutes: int) -> None:
        """Set the time limit to so many minutes from now, rounded up to whole minutes from the start."""
        hours, run_minutes, seconds = map(int, self.field("RunTime").split(":"))
        self.limit(60 * hours + run_minutes + minutes + (seconds > 0))

    def begin_requeued(self) -> None:
        """Let a requeued job begin now. slurm would wait for two minutes.

        A node refuses a start in the second in which it has killed the one before ("already killed").
        """
        wait_until(lambda: self.restarts() > 0, f"job {self.id} is requeued\n{self.output()}")
        self.wait_empty(60)
        time.sleep(2)

        def begins() -> bool:
            self.cluster.call("scontrol", "update", f"jobid={self.id}", "StartTime=now", check=False)
            return self.state() == "RUNNING"

        try:
            wait_until(begins, f"job {self.id} is requeued and begins")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.state()}\n{self.output()[-3000:]}") from error

    def begun_at(self, start: int) -> int:
        """Return the step at which a start began."""
        return int(json.loads((self.folder / f"marks/start{start}-rank0").read_text())["step"])

    # What the machine says -----------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Return every running process of this job, wherever it is in the tree."""
        return processes_with(self.marker)

    def named(self, word: str) -> list[int]:
        """Return the processes of the job that have this word in their command line."""
        found = []
        for pid in self.processes():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(part.rpartition(b"/")[2] == word.encode() for part in command[:2]):
                found.append(pid)
        return found

    def wait_empty(self, seconds: float) -> float:
        """Wait until no process of the job is left, and return how long that took in seconds."""
        started = time.monotonic()
        while left := self.processes():
            if time.monotonic() - started > seconds:
                names = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:120] for pid in left]
                raise AssertionError(f"{len(left)} processes are left after {seconds} s: {names}\n{self.output()}")
            time.sleep(0.1)
        return time.monotonic() - started

    def output(self) -> str:
        """Return the job's console."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.run_dir.glob("slurm-*.out")))

    def saved(self) -> int:
        """Return the newest step that was saved, or -1."""
        file = self.folder / "checkpoints/latest_checkpointed_iteration.txt"
        return int(file.read_text()) if file.exists() else -1

    def end(self) -> None:
        """Cancel the job and end what is left of it, after a test that failed too."""
        if self.id:
            self.cluster.call("scancel", str(self.id), check=False)
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in self.processes():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.cluster.call("scancel", "--full", str(self.id), check=False)
