"""Runs torchrun on one node: names the rank that died, forwards signals, leaves no process behind.

    python supervise.py -- torchrun ARGS...

torchrun's own report is a table of every rank that did not end well: those that it stopped itself stand in it, also the
ones it had to kill, and the first by timestamp (whole seconds) can be a survivor whose peer vanished. This leaves out
the stopped ones, picks the rank that was killed from outside if one was, and says so in one line.

Signals: TERM, INT and HUP go to torchrun, which stops the ranks (a second one kills everything at once). USR1 means
"save and stop": the ranks alone get TERM, which upstream's --exit-signal-handler answers with a checkpoint and
status 0; torchrun would follow a TERM of its own with KILL after 30 seconds, too short for a large checkpoint.

Standard library only, Linux only: it starts in milliseconds and lives as long as the training.
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 3.0

# Signals that come from outside or from a crash; -6 is not among them: NCCL's watchdog aborts the survivors with it.
SUSPECTS = ((signal.SIGKILL,), (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE))
HINTS = {
    signal.SIGKILL: "killed from outside, or by the kernel when the machine's memory was full (dmesg tells)",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGBUS: "often a full /dev/shm (docker: --ipc=host or a larger --shm-size)",
}

FIELD = re.compile(r"^  (rank|exitcode) *: (.*)$")
STOPPED = re.compile(r"Sending process (\d+) closing signal")
RANK_LINE = re.compile(r"^\[rank(\d+)\]:(.*)$")


@dataclass(slots=True)
class Failure:
    """One entry of torchrun's table."""

    rank: int
    pid: int
    exitcode: int
    root: bool
    stopped: bool

    @property
    def signum(self) -> int:
        """The signal that ended the rank, 0 for an exit code."""
        return -self.exitcode if self.exitcode < 0 else 0


def parse_failures(lines: Iterable[str]) -> list[Failure]:
    """The entries of torchrun's failure table (an empty list: it printed none)."""
    found: list[Failure] = []
    stopped: set[int] = set()
    rank = -1
    root = False
    for line in lines:
        root = root or line.startswith("Root Cause")
        if told := STOPPED.search(line):
            stopped.add(int(told[1]))
        if not (match := FIELD.match(line)):
            continue
        if match[1] == "rank":
            rank = int(match[2].split()[0])
        elif code := re.match(r"(-?\d+)\s+\(pid: (\d+)\)", match[2]):
            pid = int(code[2])
            found.append(Failure(rank, pid, int(code[1]), root, pid in stopped))
    return found


def culprit(failures: list[Failure]) -> Failure | None:
    """The rank to blame: killed before crashed before whatever torchrun saw first, and none that it stopped."""
    own = [failure for failure in failures if not failure.stopped] or failures
    for signals in SUSPECTS:
        for failure in own:
            if failure.signum in signals:
                return failure
    return next((failure for failure in own if failure.root), own[0] if own else None)


def verdict(failures: list[Failure], last_words: dict[int, str], status: int) -> str:
    """One line (two with the rank's last words) for the end of the log."""
    blamed = culprit(failures)
    if blamed is None:
        return f"torchrun ended with status {status} and named no rank: see the lines above"
    who = f"rank {blamed.rank} (host {socket.gethostname()}, pid {blamed.pid})"
    if blamed.signum:
        name = signal.Signals(blamed.signum).name
        hint = HINTS.get(signal.Signals(blamed.signum), "")
        text = f"{who} died of signal {blamed.signum} ({name}){': ' + hint if hint else ''}"
    else:
        text = f"{who} failed with exit code {blamed.exitcode}"
    others = sorted(failure.rank for failure in failures if failure is not blamed and not failure.stopped)
    text += f"; ranks {others} failed after it or with it" if others else ""
    words = last_words.get(blamed.rank)
    return f"{text}\n  its last words: {words}" if words and not blamed.signum else text


# Processes -----------------------------------------------------------------------------------------------------------


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2); OSError when it refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def parents() -> dict[int, int]:
    """pid -> parent's pid of every live process (zombies left out)."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue  # ended while we looked
            if state != "Z":
                table[int(entry.name)] = int(parent)
    return table


def descendants(root: int) -> list[int]:
    """All live processes below `root`."""
    table = parents()
    found: list[int] = []
    layer = {root}
    while layer:
        layer = {pid for pid, parent in table.items() if parent in layer}
        found += layer
    return found


def is_rank(pid: int) -> bool:
    """Did torchrun start this process as a rank (and not a rank its helpers)?"""
    try:
        return b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def send(pids: Iterable[int], signum: int) -> None:
    """Signal each; those that have ended meanwhile are no error."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def reap() -> None:
    """Collect ended children (orphans come to us: we are their subreaper)."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def sweep() -> tuple[int, list[int]]:
    """End every process still below us, gently and then not; how many there were, and those that would not go."""
    left = descendants(os.getpid())
    count = len(left)
    send(left, signal.SIGTERM)
    started = time.monotonic()
    while left and time.monotonic() - started < 3 * GRACE_S:
        if time.monotonic() - started > GRACE_S:
            send(left, signal.SIGKILL)
        time.sleep(0.05)
        reap()
        left = descendants(os.getpid())
    return count, left


# The supervisor ------------------------------------------------------------------------------------------------------


class Supervisor:
    """One torchrun, from start to the last of its processes."""

    def __init__(self, command: list[str]) -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.stopping = 0
        self.lines: deque[str] = deque(maxlen=2000)
        self.last_words: dict[int, str] = {}
        # Its own session: a terminal's Ctrl-C or a scheduler's signal reaches us alone, and we pass it on once.
        # Should we be killed ourselves, the kernel ends torchrun, and torchrun its ranks. No thread runs yet.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
        )
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self.stop)
        signal.signal(signal.SIGUSR1, self.save_and_stop)

    def stop(self, signum: int, _frame: FrameType | None) -> None:
        """First time: torchrun stops the ranks. Second time: everything is killed now."""
        if self.stopping:
            send(descendants(os.getpid()), signal.SIGKILL)
            return
        self.stopping = signum
        note(f"signal {signum} ({signal.Signals(signum).name}): stopping every rank (again: kill at once)")
        send([self.process.pid], signal.SIGTERM)

    def save_and_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Pass "save and stop" to the ranks, past torchrun."""
        ranks = [pid for pid, parent in parents().items() if parent == self.process.pid and is_rank(pid)]
        note(f"SIGUSR1: asking {len(ranks)} rank(s) to save and stop (upstream's --exit-signal-handler)")
        send(ranks, signal.SIGTERM)

    def read(self, stream: BinaryIO) -> None:
        """Show torchrun's stderr as it comes, and keep what the verdict needs."""
        for raw in stream:
            sys.stderr.buffer.write(raw)
            sys.stderr.buffer.flush()
            line = raw.decode(errors="replace").rstrip("\n")
            spoken = RANK_LINE.match(line)
            if spoken is None:
                self.lines.append(line)
            elif spoken[2].strip():
                self.last_words[int(spoken[1])] = spoken[2].strip()

    def run(self) -> int:
        """Wait for the end, clean up, speak the verdict; returns the status to exit with."""
        assert self.process.stderr is not None
        reader = threading.Thread(target=self.read, args=(self.process.stderr,), daemon=True)
        reader.start()
        status = self.process.wait()
        ended, stuck = sweep()
        reader.join(timeout=GRACE_S)
        if ended:
            note(f"ended {ended} process(es) that torchrun had left behind")
        after = f"processes that cannot be killed: {stuck}" if stuck else "no process is left"
        if self.stopping:
            note(f"stopped by signal {self.stopping} ({signal.Signals(self.stopping).name}); {after}")
            return 128 + self.stopping
        if status < 0:
            note(f"torchrun itself (pid {self.process.pid}) died of signal {-status}; {after}")
            return 128 - status
        if status:
            note(f"{verdict(parse_failures(self.lines), self.last_words, status)}\n  {after}")
        return status


def note(text: str) -> None:
    """Say it on stderr, marked as ours."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Entry: everything after `--` is torchrun's command line."""
    if len(sys.argv) < 3 or sys.argv[1] != "--":
        print("usage: supervise.py -- torchrun ARGS...", file=sys.stderr)
        return 2
    try:
        return Supervisor(sys.argv[2:]).run()
    except FileNotFoundError as error:
        note(f"cannot start {sys.argv[2]}: {error.strerror}")
        return 127


if __name__ == "__main__":
    sys.exit(main())
