"""Decide which rank made a launch fail, from what torchrun reported on each node."""

import json
import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

LAST_LINES = 25

# Signals that come from outside, then those of a crash. SIGABRT is left out, because NCCL's watchdog aborts survivors.
SUSPECTS = ((signal.SIGKILL,), (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE))
HINTS = {
    signal.SIGKILL: "killed from outside, or by the kernel because memory ran out (see dmesg)",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGBUS: "often a full /dev/shm (docker: --ipc=host or a larger --shm-size)",
}
# What a rank says that fails because another one has ended.
LOST_PEER = re.compile(
    r"closed by peer|reset by peer|peer .*(closed|exited|died)|Broken pipe|remote process exited|NCCL.*remote error"
    r"|heartbeat|failed to (recv|send), got|Timed out waiting",
    re.IGNORECASE,
)

FIELD = re.compile(r"^  (time|rank|exitcode) *: (.*)$")
STOPPED = re.compile(r"Sending process (\d+) closing signal")
NOTICED = re.compile(r"failed \(exitcode: (-?\d+)\).*local_rank: (\d+) \(pid: (\d+)\)")
RANK_PREFIX = re.compile(r"^\[rank\d+\]:")


@dataclass(slots=True)
class Failure:
    """A rank that failed.

    Attributes:
        rank: global rank.
        pid: process id.
        exitcode: exit status, or the negative number of the signal that ended the process.
        root: whether torchrun lists it as the root cause.
        stopped: whether torchrun stopped the process itself.
        host: the node.
        seconds: when torchrun saw it, in seconds since the epoch.
        log: the file of the rank's output.
        last_lines: the end of its output.
        is_shown: whether the console shows its output anyway.
    """

    rank: int
    pid: int
    exitcode: int
    root: bool
    stopped: bool
    host: str = ""
    seconds: float = 0.0
    log: str = ""
    last_lines: list[str] = field(default_factory=list)
    is_shown: bool = False

    @property
    def signum(self) -> int:
        """Return the signal that ended the rank, or 0 if it exited."""
        return -self.exitcode if self.exitcode < 0 else 0

    @property
    def lost_peer(self) -> bool:
        """Return whether its last lines say that another rank has ended."""
        return any(LOST_PEER.search(line) for line in self.last_lines[-5:])


@dataclass(slots=True)
class NodeEnd:
    """How the launch ended on one node.

    Attributes:
        host: the node.
        status: exit status of its supervisor.
        stopped_by: the signal that the supervisor got, or 0.
        stopped_at: when it got the signal, in seconds since the epoch.
        ended_at: when torchrun ended.
        message: what the supervisor says if no rank is to blame.
        failures: the ranks that failed.
        is_asked: whether its ranks were asked to save and stop.
    """

    host: str
    status: int
    stopped_by: int = 0
    stopped_at: float = 0.0
    ended_at: float = 0.0
    message: str = ""
    failures: list[Failure] = field(default_factory=list)
    is_asked: bool = False

    @property
    def has_own_fault(self) -> bool:
        """Return whether the launch failed here by itself: it was not stopped, and reports more than a lost peer."""
        blamed = culprit(self.failures)
        is_lost = blamed.lost_peer if blamed else LOST_PEER.search(self.message) is not None
        return bool(self.status) and not self.stopped_by and not is_lost

    def write(self, file: Path) -> None:
        """Write it as JSON, in one step."""
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self), indent=1))
        fresh.replace(file)

    @classmethod
    def read(cls, file: Path) -> "NodeEnd":
        """Read what `write` wrote."""
        values = json.loads(file.read_text())
        failures = [Failure(**one) for one in values.pop("failures")]
        return cls(**values, failures=failures)


def parse_failures(lines: Iterable[str]) -> list[Failure]:
    """Return the entries of torchrun's failure table, or an empty list if it printed none."""
    found: list[Failure] = []
    stopped: set[int] = set()
    rank, seconds = -1, 0.0
    root = False
    for line in lines:
        root = root or line.startswith("Root Cause")
        if sent := STOPPED.search(line):
            stopped.add(int(sent[1]))
        if not (match := FIELD.match(line)):
            continue
        if match[1] == "time":
            seconds = _seconds(match[2])
        elif match[1] == "rank":
            rank = int(match[2].split()[0])
        elif code := re.match(r"(-?\d+)\s+\(pid: (\d+)\)", match[2]):
            pid = int(code[2])
            found.append(Failure(rank, pid, int(code[1]), root, pid in stopped, seconds=seconds))
    return found


def parse_notices(lines: Iterable[str], first_rank: int) -> list[Failure]:
    """Return the failures that torchrun's log names, for when it was killed before it printed its table.

    Args:
        lines: torchrun's stderr.
        first_rank: global rank of the node's local rank 0.
    """
    matches = [match for line in lines if (match := NOTICED.search(line))]
    return [Failure(first_rank + int(m[2]), int(m[3]), int(m[1]), root=True, stopped=False) for m in matches]


def _seconds(text: str) -> float:
    try:
        return datetime.strptime(text.strip(), "%Y-%m-%d_%H:%M:%S").timestamp()
    except ValueError:
        return 0.0


def culprit(failures: Sequence[Failure]) -> Failure | None:
    """Return the rank that caused the failure.

    A rank that was killed from outside comes first, then one that crashed, then one that does not complain about its
    peers, then the one that torchrun saw first. Ranks that torchrun stopped are left out.
    """
    own = [failure for failure in failures if not failure.stopped] or list(failures)
    for signals in SUSPECTS:
        for failure in own:
            if failure.signum in signals:
                return failure
    own.sort(key=lambda failure: (failure.lost_peer, failure.seconds, not failure.root))
    return own[0] if own else None


def ended_as_asked(failures: Sequence[Failure]) -> bool:
    """Return whether ranks that were asked to save and stop failed only because of that.

    A rank without a handler dies of TERM, and others may report that it has gone.
    """
    own = [failure for failure in failures if not failure.stopped]
    return bool(own) and all(one.signum == signal.SIGTERM or one.lost_peer for one in own)


def describe(blamed: Failure, failures: Sequence[Failure]) -> str:
    """Return the message that names the rank: one line, then its last line and its log where there are any."""
    who = f"rank {blamed.rank} (host {blamed.host}, pid {blamed.pid})"
    if blamed.signum:
        name = signal.Signals(blamed.signum).name
        hint = HINTS.get(signal.Signals(blamed.signum), "")
        text = f"{who} died of signal {blamed.signum} ({name}){': ' + hint if hint else ''}"
    else:
        text = f"{who} failed with exit code {blamed.exitcode}"
    others = sorted({failure.rank for failure in failures if failure.rank != blamed.rank and not failure.stopped})
    text += f"; ranks {others} failed after it or with it" if others else ""
    if blamed.last_lines and not blamed.signum:
        text += f"\n  its last words: {blamed.last_lines[-1]}"
    return text + (f"\n  its log: {blamed.log}" if blamed.log else "")


def closing_lines(blamed: Failure | None, label: str) -> str:
    """Return the end of the rank's output to print, or an empty string if the console shows it already.

    Args:
        blamed: the rank, if one is to blame.
        label: what stands before each line.
    """
    if blamed is None or blamed.signum or blamed.is_shown or len(blamed.last_lines) < 2:
        return ""
    return "".join(f"[{label}]:{line}\n" for line in blamed.last_lines)


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """Return the last lines of a file that are not empty, without torch's prefix of the rank."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 65536))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    lines = [RANK_PREFIX.sub("", line).rstrip() for line in text.splitlines()]
    return [line for line in lines if line.strip()][-count:]


def causes(ends: Sequence[NodeEnd]) -> list[NodeEnd]:
    """Return the nodes whose failure ended the launch, or an empty list if it was stopped or did not fail.

    A node that failed by itself is the cause, and slurm stopped the others because of it. Where nodes only report lost
    peers, the cause is what came first, a stop from outside or that failure. The clocks of the nodes may differ, so
    times are compared only then.
    """
    failed = [end for end in ends if end.status and not end.stopped_by]
    if own := [end for end in failed if end.has_own_fault]:
        return own
    first_stop = min((end.stopped_at for end in ends if end.stopped_by), default=float("inf"))
    first_failure = min((end.ended_at for end in failed), default=float("inf"))
    return failed if first_failure <= first_stop else []


def job_verdict(ends: Sequence[NodeEnd]) -> tuple[int, str]:
    """Return the status of a launch on several nodes, and the message for the end of its log."""
    if failed := causes(ends):
        blamed = culprit([failure for end in failed for failure in end.failures])
        if blamed is not None:
            return failed[0].status, describe(blamed, [failure for end in ends for failure in end.failures])
        return failed[0].status, "\n".join(f"{end.host}: {end.message}" for end in failed)
    if stops := [end for end in ends if end.stopped_by]:
        first = min(stops, key=lambda end: end.stopped_at)
        name = signal.Signals(first.stopped_by).name
        return 128 + first.stopped_by, f"stopped by signal {first.stopped_by} ({name})"
    return 0, ""
