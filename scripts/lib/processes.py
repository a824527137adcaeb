"""Find, signal and end processes below this one. Linux only."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 3.0


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def on_stop(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call a function on TERM, INT and HUP. A HUP that is ignored, as after nohup, stays ignored."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def become_subreaper() -> None:
    """Make this process the parent of processes below it whose own parent ends.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Let the kernel send TERM to this process when its parent ends. Call it between fork and exec.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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
    """Return whether torchrun started this process as a rank. Helpers that a rank starts have the same variables.

    The supervisor starts torchrun without them.
    """
    try:
        return b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def ranks_below(root: int) -> list[int]:
    """Return the ranks below `root`, without the processes that they started."""
    table = parents()
    return [pid for pid in descendants(root) if is_rank(pid) and not is_rank(table.get(pid, 0))]


def catches(pid: int, signum: int) -> bool:
    """Return whether a process has a handler of its own for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (signum - 1) & 1)


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
