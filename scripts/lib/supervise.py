"""Run torchrun on one node, name the rank that died, forward signals, and leave no process behind.

    python supervise.py -- torchrun ARGS...

torchrun reports a table of all ranks that failed. It includes ranks that torchrun stopped itself, and the first one by
timestamp (in whole seconds) may be a survivor that lost its peer. This script leaves out the stopped ranks, prefers a
rank that was killed from outside, and names the culprit in one line.

TERM, INT and HUP are forwarded to torchrun, which stops the ranks. A second signal kills everything at once. USR1 means
"save and stop": only the ranks get TERM, and with upstream's --exit-signal-handler they save a checkpoint and exit with
status 0. torchrun is left out, because it would kill the ranks 30 seconds after a TERM, before a large checkpoint is
complete.

It uses only the standard library, so that it starts in milliseconds, and runs only on Linux.
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

# Signals that come from outside, then those of a crash. SIGABRT is left out, because NCCL's watchdog aborts survivors.
SUSPECTS = ((signal.SIGKILL,), (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE))
HINTS = {
    signal.SIGKILL: "killed from outside, or by the kernel because memory ran out (see dmesg)",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGBUS: "often a full /dev/shm (docker: --ipc=host or a larger --shm-size)",
}

FIELD = re.compile(r"^  (rank|exitcode) *: (.*)$")
STOPPED = re.compile(r"Sending process (\d+) closing signal")
RANK_LINE = re.compile(r"^\[rank(\d+)\]:(.*)$")


@dataclass(slots=True)
class Failure:
    """One entry of torchrun's table.

    Attributes:
        rank: global rank.
        pid: process id.
        exitcode: exit status, or the negative number of the signal that ended the process.
        root: whether torchrun lists it as the root cause.
        stopped: whether torchrun stopped the process itself.
    """

    rank: int
    pid: int
    exitcode: int
    root: bool
    stopped: bool

    @property
    def signum(self) -> int:
        """Return the signal that ended the rank, or 0 if it exited."""
        return -self.exitcode if self.exitcode < 0 else 0


def parse_failures(lines: Iterable[str]) -> list[Failure]:
    """Return the entries of torchrun's failure table, or an empty list if it printed none."""
    found: list[Failure] = []
    stopped: set[int] = set()
    rank = -1
    root = False
    for line in lines:
        root = root or line.startswith("Root Cause")
        if sent := STOPPED.search(line):
            stopped.add(int(sent[1]))
        if not (match := FIELD.match(line)):
            continue
        if match[1] == "rank":
            rank = int(match[2].split()[0])
        elif code := re.match(r"(-?\d+)\s+\(pid: (\d+)\)", match[2]):
            pid = int(code[2])
            found.append(Failure(rank, pid, int(code[1]), root, pid in stopped))
    return found


def culprit(failures: list[Failure]) -> Failure | None:
    """Return the rank that caused the failure.

    A rank that was killed from outside comes first, then one that crashed, then the one that torchrun saw first. Ranks
    that torchrun stopped are left out.
    """
    own = [failure for failure in failures if not failure.stopped] or failures
    for signals in SUSPECTS:
        for failure in own:
            if failure.signum in signals:
                return failure
    return next((failure for failure in own if failure.root), own[0] if own else None)


def verdict(failures: list[Failure], last_words: dict[int, str], status: int) -> str:
    """Return the message for the end of the log: one line, or two with the last line that the rank printed."""
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


def prctl(option: int, value: int) -> None:
    """Call prctl(2).

    Raises:
        OSError: the call failed.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def parents() -> dict[int, int]:
    """Return the parent's pid of every running process by its pid, without zombies."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue  # the process ended meanwhile
            if state != "Z":
                table[int(entry.name)] = int(parent)
    return table


def descendants(root: int) -> list[int]:
    """Return all running processes below `root`."""
    table = parents()
    found: list[int] = []
    layer = {root}
    while layer:
        layer = {pid for pid, parent in table.items() if parent in layer}
        found += layer
    return found


def is_rank(pid: int) -> bool:
    """Return whether torchrun started this process as a rank. Helpers that a rank starts do not count."""
    try:
        return b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def send(pids: Iterable[int], signum: int) -> None:
    """Send a signal to each process. Processes that have ended are ignored."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def reap() -> None:
    """Collect ended children. Orphans are children of this process, because it is their subreaper."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def sweep() -> tuple[int, list[int]]:
    """End every process below this one, with TERM and then with KILL.

    Returns:
        The number of processes found, and the pids of those that could not be killed.
    """
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


class Supervisor:
    """Start torchrun and supervise it until its last process has ended.

    Args:
        command: torchrun's command line.
    """

    def __init__(self, command: list[str]) -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.stopping = 0
        self.lines: deque[str] = deque(maxlen=2000)
        self.last_words: dict[int, str] = {}
        # torchrun gets its own session, so that Ctrl-C and a scheduler's signals reach only this process, which
        # forwards them once. If this process is killed, the kernel ends torchrun, and torchrun ends its ranks.
        # preexec_fn is safe, because no thread runs yet.
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
        """Let torchrun stop the ranks. At the second call, kill everything at once."""
        if self.stopping:
            send(descendants(os.getpid()), signal.SIGKILL)
            return
        self.stopping = signum
        note(
            f"signal {signum} ({signal.Signals(signum).name}): stopping all ranks (a second signal kills them at once)"
        )
        send([self.process.pid], signal.SIGTERM)

    def save_and_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Ask the ranks to save and stop, without torchrun."""
        ranks = [pid for pid, parent in parents().items() if parent == self.process.pid and is_rank(pid)]
        note(f"SIGUSR1: asking {len(ranks)} rank(s) to save and stop (upstream's --exit-signal-handler)")
        send(ranks, signal.SIGTERM)

    def read(self, stream: BinaryIO) -> None:
        """Forward torchrun's stderr, and keep the lines that the final message needs."""
        for raw in stream:
            sys.stderr.buffer.write(raw)
            sys.stderr.buffer.flush()
            line = raw.decode(errors="replace").rstrip("\n")
            match = RANK_LINE.match(line)
            if match is None:
                self.lines.append(line)
            elif match[2].strip():
                self.last_words[int(match[1])] = match[2].strip()

    def run(self) -> int:
        """Wait until torchrun ends, end what is left, print the final message and return the exit status."""
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
    """Print a line to stderr that is marked as the launcher's."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Run the command after `--` and return its exit status."""
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
