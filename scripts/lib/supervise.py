"""Run torchrun on one node, show what a person has to see, forward signals, and leave no process behind.

    python supervise.py --start-dir DIR [--nodes N --meeting HOST:PORT] [--quiet] [--verbose] -- torchrun ARGS...
    python supervise.py --start-dir DIR --nodes N --store HOST:PORT -- torchrun ARGS...     # torchrun numbers the nodes

Each rank writes into `DIR/ranks/`. The console shows the output of the first and the last rank, which print the
training's progress, without the details of upstream's start (`console.py`). If a rank fails, it shows the end of that
rank's output and names the rank.

| signal | meaning |
|---|---|
| USR1, or the file `DIR/stop` | save and stop: the ranks get TERM, or the signal of --exit-signal, and save |
| TERM, HUP, INT | stop: the same, but after LONGSEQ_STOP_SECONDS (15) everything is killed |
| INT, a second time | everything is killed at once |
| HUP that was ignored at the start (nohup) | nothing |

torchrun gets none of them, because it would kill the ranks 30 seconds later, before a large checkpoint is complete.
A scheduler may send TERM several times, and sends it while ranks save, so a second TERM changes nothing.

It uses only the standard library, so that it starts in milliseconds, and runs only on Linux.
"""

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.lib import meeting, output, processes, verdict
from scripts.lib.console import BUDGET
from scripts.lib.follow import Follower
from scripts.lib.rank import host_name, log_name

POLL_S = 0.1
BEAT_POLLS = 50
STOP_FILE = "stop"
HANDLER = "--exit-signal-handler"
HANDLED = "--exit-signal"  # upstream's flag for the signal that the handler waits for
ENDS = re.compile(r"closing signal|failed \(exitcode")
# torchrun sets these for each rank. Inherited ones would make torchrun itself look like a rank.
OF_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?RANK|ROLE_NAME|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE"
    r"|TORCHELASTIC_(RESTART_COUNT|MAX_RESTARTS|RUN_ID|USE_AGENT_STORE|ERROR_FILE)"
)


def stop_seconds() -> float:
    """Return how long ranks may take to end after TERM, in seconds."""
    text = os.environ.get("LONGSEQ_STOP_SECONDS", "15")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        sys.exit(f"error: LONGSEQ_STOP_SECONDS={text} is not a number of seconds")
    return seconds


def save_signal(command: Sequence[str]) -> int:
    """Return the signal on which the ranks save: that of upstream's --exit-signal, which is TERM by default.

    Args:
        command: torchrun's command line, with the flags of the script.
    """
    name = signal.SIGTERM.name
    for word, following in zip(command, [*command[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag == HANDLED:
            name = value or following
    return signal.Signals.__members__.get(name, signal.SIGTERM) if HANDLER in command else signal.SIGTERM


class Supervisor:
    """Start torchrun and supervise it until its last process has ended.

    Args:
        options: the parsed command line.
        command: torchrun's command line.
    """

    def __init__(self, options: argparse.Namespace, command: list[str]) -> None:
        self.start_dir: Path = options.start_dir
        self.nodes: int = options.nodes
        self.node = int(os.environ.get("SLURM_NODEID", "0")) if options.meeting else 0
        self.is_quiet: bool = options.quiet
        self.is_verbose: bool = options.verbose
        self.host = host_name()
        self.grace = stop_seconds()
        self.stop_signal = 0
        self.stopped_at = 0.0
        self.is_wanted = False  # whether the ranks shall save and stop
        self.is_asked = False  # whether they were asked to
        self.is_waiting = False  # whether the request waits for ranks that cannot save yet
        self.kill_at = float("inf")
        self.lines: deque[str] = deque(maxlen=2000)
        self.per_node = _per_node(command)
        self.save_signal = save_signal(command)
        self.shown = {0, self.nodes * self.per_node - 1}
        for name in ("ranks", "nodes"):
            (self.start_dir / name).mkdir(parents=True, exist_ok=True)
        processes.become_subreaper()
        processes.on_stop(self.stop)
        signal.signal(signal.SIGUSR1, self.save_and_stop)
        self.process: subprocess.Popen[bytes] | None = None
        self.command = command

    def start(self) -> "subprocess.Popen[bytes]":
        """Start torchrun, below the keeper and in a session of its own.

        Ctrl-C and a scheduler's signals to a process group then reach only this process. USR1 is ignored below it,
        because other schedulers signal every process.
        """

        def prepare() -> None:
            processes.end_with_parent()
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

        environment = {name: value for name, value in os.environ.items() if not OF_RANKS.fullmatch(name)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("keeper.py")), *self.command],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=prepare,  # noqa: PLW1509  # safe, because no thread runs yet
            env={**environment, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, round(self.grace)))},
        )
        return self.process

    def stop(self, signum: int, _frame: FrameType | None) -> None:
        """Ask the ranks to end, and set the time at which everything is killed."""
        if self.stop_signal:
            if signum == signal.SIGINT and self.stop_signal == signal.SIGINT:
                self.kill_at = 0.0
            return
        self.stop_signal, self.stopped_at = signum, time.time()
        self.kill_at = time.monotonic() + self.grace
        name = signal.Signals(signum).name
        again = " (again: kill them at once)" if signum == signal.SIGINT else ""
        self.note(f"signal {signum} ({name}): stopping all ranks within {self.grace:.0f} s{again}")

    def save_and_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Leave the word for all nodes, and for the loop of this one."""
        self.is_wanted = True
        with contextlib.suppress(OSError):
            (self.start_dir / STOP_FILE).touch()

    def ask(self) -> None:
        """Ask the ranks to save and stop, once.

        A rank that has not installed upstream's handler yet would die of the signal without saving. Unless everything
        has to end, it is asked when it has.
        """
        if self.is_asked or self.process is None:
            return
        ranks = processes.ranks_below(self.process.pid)
        if not self.stop_signal:
            will_save = HANDLER in self.command
            if not ranks or (will_save and not all(processes.catches(rank, self.save_signal) for rank in ranks)):
                if not self.is_waiting:
                    self.note("asked to save and stop while the ranks start: they are asked as soon as they can save")
                self.is_waiting = True
                return
            self.note(f"asking {len(ranks)} rank(s) to save and stop (upstream's {HANDLER})")
        for rank in ranks:  # one that does not save has to end
            can_save = processes.catches(rank, self.save_signal)
            processes.send([rank], self.save_signal if can_save else signal.SIGTERM)
        self.is_asked = bool(ranks)

    def read(self, stream: BinaryIO) -> None:
        """Keep torchrun's stderr in a file, and the lines that the final message needs.

        torchrun would wait if nobody read its stderr, so a full disk does not end this.
        """
        with (self.start_dir / f"nodes/{self.host}.log").open("ab", buffering=0) as file:
            for raw in stream:
                with contextlib.suppress(OSError):
                    file.write(raw)
                line = raw.decode(errors="replace").rstrip("\n")
                self.lines.append(line)
                if ENDS.search(line) and self.kill_at == float("inf"):
                    # A rank has failed. The others may wait for it for longer than torchrun waits for them.
                    self.kill_at = time.monotonic() + self.grace

    def beat(self) -> None:
        """Say that this machine is alive, where machines without slurm have entered this start (`folders.sh`)."""
        with contextlib.suppress(OSError):
            os.utime(self.start_dir / f"machines/{self.host}")

    def wait(self, process: "subprocess.Popen[bytes]") -> int:
        """Wait until torchrun ends; ask the ranks to stop and kill them when it is time."""
        stop_file = self.start_dir / STOP_FILE
        polls = 0
        while (status := process.poll()) is None:
            if polls % BEAT_POLLS == 0:
                self.beat()
            if self.stop_signal or (polls % 5 == 0 and (self.is_wanted or stop_file.exists())):
                self.ask()
            late = time.monotonic() - self.kill_at
            if late > 0:
                below = processes.descendants(process.pid)
                ranks = [pid for pid in below if processes.is_rank(pid)]
                # torchrun prints which rank failed after its ranks have ended, but it may hang itself.
                processes.send(below if late > 2 or self.stop_signal else ranks, signal.SIGKILL)
            polls += 1
            time.sleep(POLL_S)
        return status

    def run(self) -> int:
        """Supervise torchrun, end what is left, print the final message and return the exit status."""
        process = self.start()
        assert process.stderr is not None
        reader = threading.Thread(target=self.read, args=(process.stderr,), daemon=True)
        reader.start()
        ranks = self.start_dir / "ranks"
        budget = None if "preflight" in self.command else BUDGET  # its table may be long
        follower = Follower(ranks, self.host, self.shown, self.nodes > 1, self.is_verbose, budget)
        follower.start()
        status = self.wait(process)
        ended_at = time.time()
        _, stuck = processes.sweep()  # what the keeper left, if it was killed itself
        reader.join(timeout=processes.GRACE_S)
        end = self.describe_end(status, ended_at)
        self.record(end)  # before anything is written to the console, which may be gone
        follower.finish(lambda: bool(self.stop_signal))
        if stuck:
            self.note(f"processes that cannot be killed: {stuck}")
        self.explain_end(end, "" if stuck else "\n  no process is left")
        return end.status

    def refuse(self, problem: str) -> int:
        """Write and print why nothing was started, and return the exit status."""
        end = verdict.NodeEnd(self.host, 1, ended_at=time.time(), message=problem)
        self.record(end)
        self.explain_end(end)
        return end.status

    def describe_end(self, status: int, ended_at: float = 0.0) -> verdict.NodeEnd:
        """Return how the launch ended on this node.

        Args:
            status: of torchrun.
            ended_at: when it ended, in seconds since the epoch.
        """
        end = verdict.NodeEnd(self.host, status, self.stop_signal, self.stopped_at, ended_at, is_asked=self.is_asked)
        if self.stop_signal:
            end.status = 128 + self.stop_signal
            end.message = f"stopped by signal {self.stop_signal} ({signal.Signals(self.stop_signal).name})"
        elif status:
            end.status = status if 0 < status < 128 else 1
            end.failures = self.failures()
            end.message = self.explain(status, end.failures)
        return end

    def record(self, end: verdict.NodeEnd) -> None:
        """Write into the folder of this start how it ended."""
        file = self.start_dir / f"nodes/{self.host}.json"
        try:
            end.write(file)
        except OSError as error:
            self.note(f"{file} cannot be written: {error.strerror}")

    def explain_end(self, end: verdict.NodeEnd, after: str = "") -> None:
        """Print why it ended, and wait for a reader that is behind, unless the launcher was told to end."""
        if not end.message or self.is_quiet:
            return
        seconds = output.PATIENCE_S if self.stop_signal else None
        blamed = verdict.culprit(end.failures)
        last = verdict.closing_lines(blamed, f"rank{blamed.rank}" if blamed else "")
        output.write(sys.stderr, last.encode(errors="replace"), seconds)
        self.note(end.message + after, seconds)

    def failures(self) -> list[verdict.Failure]:
        """Return the ranks that failed on this node, with the ends of their logs."""
        found = verdict.parse_failures(self.lines)
        found = found or verdict.parse_notices(self.lines, self.node * self.per_node)
        for one in found:
            one.host = self.host
            log = self.start_dir / "ranks" / log_name(one.rank, self.host)
            one.log = str(log) if log.exists() else ""
            one.last_lines = verdict.last_lines(log)
            one.is_shown = one.rank in self.shown
        return found

    def explain(self, status: int, failures: list[verdict.Failure]) -> str:
        """Return why torchrun ended with this status."""
        blamed = verdict.culprit(failures)
        if blamed is not None:
            return verdict.describe(blamed, failures)
        log = self.start_dir / f"nodes/{self.host}.log"
        if status < 0:
            return f"the keeper of torchrun died of signal {-status}"
        if status > 128:
            return f"torchrun itself died of signal {status - 128}; its log: {log}"
        words = "\n    ".join(verdict.last_lines(log, 8))
        return f"torchrun ended with status {status} and named no rank; its log: {log}\n    {words}"

    def note(self, text: str, seconds: float | None = output.PATIENCE_S) -> None:
        """Print a line to stderr that is marked as the launcher's, with the node if there are several.

        Args:
            text: the line.
            seconds: how long to wait for a reader that is behind; None: as long as it takes.
        """
        where = f" {self.host}:" if self.nodes > 1 else ""
        output.write(sys.stderr, f"launch:{where} {text}\n".encode(errors="replace"), seconds)


def _per_node(command: list[str]) -> int:
    """Return the ranks of a node, from torchrun's command line."""
    try:
        return int(command[command.index("--nproc-per-node") + 1])
    except (ValueError, IndexError):
        return 1


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line into options and torchrun's command."""
    parser = argparse.ArgumentParser(prog="supervise.py", allow_abbrev=False)
    parser.add_argument("--start-dir", type=Path, required=True, help="folder of this start")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--meeting", help="HOST:PORT of the first node: slurm's node number gives the ranks")
    parser.add_argument("--store", help="HOST:PORT of torchrun's store: torchrun gives the ranks")
    parser.add_argument("--quiet", action="store_true", help="leave the final message to the job")
    parser.add_argument("--verbose", action="store_true", help="show all lines of the first and the last rank")
    split = words.index("--") if "--" in words else len(words)
    command = words[split + 1 :]
    if not command:
        parser.error("no command after --")
    return parser.parse_args(words[:split]), command


def main() -> int:
    """Run the command after `--` and return its exit status."""
    options, command = parse(sys.argv[1:])
    supervisor = Supervisor(options, command)
    if options.meeting:
        host, port = meeting.split(options.meeting)
        problem = meeting.check(host, port, supervisor.node)  # a socket of the first node stays open
        rendezvous = ["--nnodes", str(options.nodes), "--node-rank", str(supervisor.node)]
        supervisor.command[1:1] = [*rendezvous, "--master-addr", host, "--master-port", str(port)]
    else:
        problem = meeting.check_store(*meeting.split(options.store)) if options.store else ""
    return supervisor.refuse(problem) if problem and isinstance(problem, str) else supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
