"""Run srun inside a slurm job, say in the end what happened, and requeue the job if that helps.

    python job.py --start-dir DIR [--max-requeues N] [--save DIR] -- srun ARGS...

| what happens | what follows |
|---|---|
| USR1 to the job or to its steps, or `DIR/stop` appears | the ranks save and stop; the job is requeued |
| TERM to the steps only: a preemption with grace time | the ranks save and stop, in time; the job is requeued |
| TERM to the job: scancel, time limit, a requeue by hand | the ranks save and stop, in time; the job ends |
| a rank fails | the job ends with the message that names the rank |

"In time" means LONGSEQ_STOP_SECONDS (15), after which the ranks are killed.
A job is requeued only if it has saved a checkpoint since this start, and at most N times.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.lib import verdict
from scripts.lib.supervise import STOP_FILE

POLL_S = 0.2
# slurm sends TERM to the steps of a job first and to the job itself a moment later.
TERM_WAIT_S = 3.0


def newest_iteration(folder: Path | None) -> int:
    """Return the number of the newest complete checkpoint of a folder, or -1 if there is none."""
    if folder is None or not folder.is_dir():
        return -1
    found = [-1]
    for checkpoint in folder.glob("iter_*"):
        number = checkpoint.name.removeprefix("iter_")
        # metadata.json is written last (--ckpt-format torch_dist).
        if number.isdecimal() and (checkpoint / "metadata.json").is_file():
            found.append(int(number))
    with contextlib.suppress(OSError, ValueError):
        found.append(int((folder / "latest_checkpointed_iteration.txt").read_text()))
    return max(found)


class Job:
    """One start of a slurm job.

    Args:
        options: the parsed command line.
        command: srun's command line.
    """

    def __init__(self, options: argparse.Namespace, command: list[str]) -> None:
        self.start_dir: Path = options.start_dir
        self.max_requeues: int = options.max_requeues
        self.save: Path | None = options.save
        self.first_iteration = newest_iteration(self.save)
        self.job_id = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.term = 0
        self.process: subprocess.Popen[bytes] | None = None
        signal.signal(signal.SIGUSR1, self.save_and_stop)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self.stop)
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def save_and_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Leave the word for the supervisors, and tell them at once through srun."""
        say(f"USR1: {self.job_id} is asked to save and stop")
        (self.start_dir / STOP_FILE).touch()
        if self.process is not None:
            self.process.send_signal(signal.SIGUSR1)

    def stop(self, signum: int, _frame: FrameType | None) -> None:
        """Forward the signal once. srun answers TERM by ending the step."""
        if not self.term and self.process is not None:
            self.process.send_signal(signal.SIGTERM)
        self.term = self.term or signum

    def wait(self) -> int:
        """Wait until srun ends, and return its status."""
        assert self.process is not None
        while (status := self.process.poll()) is None:
            time.sleep(POLL_S)
        return status

    def ends(self) -> list[verdict.NodeEnd]:
        """Return how the launch ended on each node that has said so."""
        return [verdict.NodeEnd.read(file) for file in sorted((self.start_dir / "nodes").glob("*.json"))]

    def run(self) -> int:
        """Wait for the end, print what happened, requeue, and return the exit status."""
        code = self.wait()
        status, message = verdict.job_verdict(ends := self.ends())
        is_asked = (self.start_dir / STOP_FILE).exists()
        if not status and code:
            status = code if code > 0 else 128 - code
            message = f"srun ended with status {code}" if code > 0 else f"srun was killed by signal {-code}"
        is_stopped = status == 128 + signal.SIGTERM or (code == 128 + signal.SIGTERM and not message)
        if is_stopped and not self.term and not is_asked:
            time.sleep(TERM_WAIT_S)
        if self.term:
            name = signal.Signals(self.term).name
            say(f"the job was stopped by {name} (cancelled, at its time limit, or requeued by hand)")
            return 128 + self.term
        if status and not is_stopped:
            self.show_failure(ends, message)
        elif not is_asked and not is_stopped:
            say("the training has ended")
            return 0
        if (is_asked or is_stopped) and self.can_requeue(is_asked):
            done = subprocess.run(["scontrol", "requeue", self.job_id], capture_output=True, text=True, check=False)
            if done.returncode:
                say(f"scontrol requeue {self.job_id} failed: {done.stderr.strip()}")
        return status

    def show_failure(self, ends: list[verdict.NodeEnd], message: str) -> None:
        """Print the end of the output of the rank to blame, and the message."""
        blamed = verdict.culprit([one for end in ends if not end.stopped_by for one in end.failures])
        print(verdict.closing_lines(blamed, f"rank{blamed.rank} {blamed.host}" if blamed else ""), end="")
        say(message)

    def can_requeue(self, is_asked: bool) -> bool:
        """Return whether to requeue the job, and say why or why not."""
        why = "asked to save and stop" if is_asked else "stopped from outside (TERM to its steps: a preemption)"
        newest = newest_iteration(self.save)
        if self.max_requeues == 0:
            say(f"{why}: not requeued (--max-requeues 0)")
        elif self.save is None:
            say(f"{why}: not requeued, because the training has no --save and would begin again")
        elif newest <= self.first_iteration:
            say(f"{why}: not requeued, because this start has saved no checkpoint in {self.save}")
        elif self.restarts >= self.max_requeues:
            say(f"{why}: not requeued, because it was requeued {self.restarts} times (--max-requeues)")
        else:
            say(f"{why}: requeued to continue at iteration {newest}")
            return True
        return False


def say(text: str) -> None:
    """Print a line that is marked as the launcher's."""
    print(f"launch: {text}", flush=True)


def main() -> int:
    """Run the command after `--` and return the exit status of the job."""
    parser = argparse.ArgumentParser(prog="job.py", allow_abbrev=False)
    parser.add_argument("--start-dir", type=Path, required=True)
    parser.add_argument("--max-requeues", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder of the checkpoints")
    split = sys.argv.index("--")
    return Job(parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]).run()


if __name__ == "__main__":
    sys.exit(main())
