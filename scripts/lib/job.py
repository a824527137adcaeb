"""Run srun inside a slurm job, say in the end what happened, and requeue the job if that helps.

    python job.py --start-dir DIR [--nodes N] [--max-requeues N] [--save DIR] -- srun ARGS...

| what happens | what follows |
|---|---|
| USR1 to the job or to its steps, or `DIR/stop` appears | the ranks save and stop; the job is requeued |
| the training ends by itself, asked to stop or not | the job ends |
| TERM to the steps only: a preemption with grace time | the ranks save and stop, in time; the job is requeued |
| TERM to the job: scancel, time limit, a requeue by hand | the ranks save and stop, in time; the job ends |
| a rank fails | the job ends with the message that names the rank |

"In time" means LONGSEQ_STOP_SECONDS (15), after which the ranks are killed.
A job is requeued only if it has saved a checkpoint since this start, and at most N times. `DIR/job.json` says whether.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.lib import output, processes, verdict
from scripts.lib.supervise import STOP_FILE

POLL_S = 0.2
# slurm sends TERM to the steps of a job first and to the job itself a moment later.
TERM_WAIT_S = 3.0
# What upstream and our guards say if a training ends before its last step, or before its last evaluation.
LEFT_EARLY = re.compile(r"exiting program|asked to stop")
RUNNING, REQUEUED, ENDED = "running", "requeued", "ended"


def checkpoints(folder: Path | None) -> dict[int, int]:
    """Return when each complete checkpoint of a folder was written (ns), by its iteration."""
    found: dict[int, int] = {}
    if folder is None:
        return found
    for checkpoint in folder.glob("iter_*"):
        number = checkpoint.name.removeprefix("iter_")
        if number.isdecimal():
            with contextlib.suppress(OSError):
                # It is written last (--ckpt-format torch_dist).
                found[int(number)] = (checkpoint / "metadata.json").stat().st_mtime_ns
    tracker = folder / "latest_checkpointed_iteration.txt"
    with contextlib.suppress(OSError, ValueError):
        found.setdefault(int(tracker.read_text()), tracker.stat().st_mtime_ns)
    return found


class Job:
    """One start of a slurm job.

    Args:
        options: the parsed command line.
        command: srun's command line.
    """

    def __init__(self, options: argparse.Namespace, command: list[str]) -> None:
        self.start_dir: Path = options.start_dir
        self.nodes: int = options.nodes
        self.max_requeues: int = options.max_requeues
        self.save: Path | None = options.save
        self.before = checkpoints(self.save)
        self.job_id = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.term = 0
        self.is_asked = False  # by a signal; a file may say so, too
        self.is_passed_on = False
        self.process: subprocess.Popen[bytes] | None = None
        self.write_outcome(RUNNING)
        signal.signal(signal.SIGUSR1, self.save_and_stop)
        processes.on_stop(self.stop)
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def save_and_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Leave the word for the supervisors. The loop tells them through srun, too."""
        self.is_asked = True
        with contextlib.suppress(OSError):
            (self.start_dir / STOP_FILE).touch()
        say(f"USR1: {self.job_id} is asked to save and stop")

    def stop(self, signum: int, _frame: FrameType | None) -> None:
        """Forward the signal once. srun answers TERM by ending the step."""
        if not self.term and self.process is not None:
            self.process.send_signal(signal.SIGTERM)
        self.term = self.term or signum

    def pass_on(self) -> None:
        """Send the request through srun, once, when the supervisors of all nodes wait for it.

        Before, the signal would end the program that creates the container of a node, and the job with it.
        """
        if not self.is_asked or self.is_passed_on or self.process is None:
            return
        if len(list((self.start_dir / "nodes").glob("*.log"))) >= self.nodes:
            self.is_passed_on = True
            self.process.send_signal(signal.SIGUSR1)

    def wait(self) -> int:
        """Wait until srun ends, and return its status."""
        assert self.process is not None
        while (status := self.process.poll()) is None:
            self.pass_on()
            time.sleep(POLL_S)
        return status

    def ends(self) -> list[verdict.NodeEnd]:
        """Return how the launch ended on each node that has said so."""
        return [verdict.NodeEnd.read(file) for file in sorted((self.start_dir / "nodes").glob("*.json"))]

    def run(self) -> int:
        """Wait for the end, print what happened, requeue, and return the exit status."""
        code = self.wait()
        status, message = verdict.job_verdict(ends := self.ends())
        is_asked = self.is_asked or (self.start_dir / STOP_FILE).exists()
        if not status and code:
            status = code if code > 0 else 128 - code
            silent = "" if ends else ", and no node has said how it ended; the lines above may say why"
            message = f"srun ended with status {code}{silent}" if code > 0 else f"srun was killed by signal {-code}"
        is_stopped = status == 128 + signal.SIGTERM or (code == 128 + signal.SIGTERM and not message)
        if is_stopped and not self.term and not is_asked:
            time.sleep(TERM_WAIT_S)
        if self.term:
            self.write_outcome(ENDED)
            name = signal.Signals(self.term).name
            say(f"the job was stopped by {name} (cancelled, at its time limit, or requeued by hand)")
            return 128 + self.term
        if status and not is_stopped:
            self.show_failure(ends, message)
        is_requested = is_stopped or (is_asked and self.ended_as_asked(status, ends))
        if not status and not is_requested:
            say("the training has ended")
        if not (is_requested and self.can_requeue(is_asked) and self.requeue()):
            self.write_outcome(ENDED)
        return status

    def ended_as_asked(self, status: int, ends: list[verdict.NodeEnd]) -> bool:
        """Return whether the ranks ended because they were asked to, not by a failure or after the last step."""
        if status:
            return verdict.ended_as_asked([one for end in verdict.causes(ends) for one in end.failures])
        were_asked = not ends or any(end.is_asked for end in ends)
        return were_asked and not self.has_trained_all()

    def has_trained_all(self) -> bool:
        """Return whether this start has saved the last iteration, and did not leave the training before its end."""
        try:
            last = json.loads((self.start_dir / "arguments.json").read_text())["train_iters"]
            is_last = self.newest_iteration() >= int(last)
        except (OSError, ValueError, KeyError, TypeError):
            return False  # not upstream's training
        logs = (self.start_dir / "ranks").glob("rank-00000-*.log")
        return is_last and not any(LEFT_EARLY.search(line) for log in logs for line in verdict.last_lines(log))

    def newest_iteration(self) -> int:
        """Return the newest iteration that was saved since this start, or -1."""
        return max((at for at, when in checkpoints(self.save).items() if self.before.get(at) != when), default=-1)

    def show_failure(self, ends: list[verdict.NodeEnd], message: str) -> None:
        """Print the end of the output of the rank to blame, and the message."""
        blamed = verdict.culprit([one for end in verdict.causes(ends) for one in end.failures])
        last = verdict.closing_lines(blamed, f"rank{blamed.rank} {blamed.host}" if blamed else "")
        output.write(sys.stdout, last.encode(errors="replace"))
        say(message, None)

    def requeue(self) -> bool:
        """Requeue the job, and return whether slurm does so. It may end this process at once."""
        self.write_outcome(REQUEUED)
        done = subprocess.run(["scontrol", "requeue", self.job_id], capture_output=True, text=True, check=False)
        if done.returncode:
            say(f"not requeued: slurm refuses it ({done.stderr.strip()}); a batch script needs #SBATCH --requeue")
        return done.returncode == 0

    def write_outcome(self, outcome: str) -> None:
        """Say whether the job goes on, for those who watch the run folder."""
        file = self.start_dir / "job.json"
        with contextlib.suppress(OSError):
            file.with_suffix(".new").write_text(json.dumps({"job": self.job_id, "outcome": outcome}) + "\n")
            file.with_suffix(".new").replace(file)

    def can_requeue(self, is_asked: bool) -> bool:
        """Return whether to requeue the job, and say why or why not."""
        why = "asked to save and stop" if is_asked else "stopped from outside (TERM to its steps: a preemption)"
        newest = self.newest_iteration()
        if self.max_requeues == 0:
            say(f"{why}: not requeued (--max-requeues 0)")
        elif self.save is None:
            say(f"{why}: not requeued, because the training has no --save and would begin again")
        elif newest < 0:
            say(f"{why}: not requeued, because this start has saved no checkpoint in {self.save}")
        elif self.restarts >= self.max_requeues:
            say(f"{why}: not requeued, because it was requeued {self.restarts} times (--max-requeues)")
        else:
            say(f"{why}: requeued to continue at iteration {newest}")
            return True
        return False


def say(text: str, seconds: float | None = output.PATIENCE_S) -> None:
    """Print a line that is marked as the launcher's.

    Args:
        text: the line.
        seconds: how long to wait for a reader that is behind; None: as long as it takes.
    """
    output.write(sys.stdout, f"launch: {text}\n".encode(errors="replace"), seconds)


def main() -> int:
    """Run the command after `--` and return the exit status of the job."""
    parser = argparse.ArgumentParser(prog="job.py", allow_abbrev=False)
    parser.add_argument("--start-dir", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=1, help="number of supervisors that srun starts")
    parser.add_argument("--max-requeues", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder of the checkpoints")
    split = sys.argv.index("--")
    return Job(parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]).run()


if __name__ == "__main__":
    sys.exit(main())
