"""Run a command and leave no process behind, even if the parent of this process is killed.

    python keeper.py COMMAND...

The supervisor runs torchrun through this process. Each of the two ends everything below it if the other one is killed:
a scheduler may kill the supervisor alone (slurm's proctrack/pgid), and a torchrun that waits for a store of another
node does not react to TERM. Signals to this process are ignored, because the supervisor decides what they mean.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.lib import processes

POLL_S = 0.1


def main() -> int:
    """Run the command. Return its exit status, or 128 + signal."""
    parent = os.getppid()
    processes.become_subreaper()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(signum, lambda *_: None)  # a handler, unlike SIG_IGN, is not inherited by the command
    try:
        # preexec_fn is safe, because no thread runs.
        child = subprocess.Popen(sys.argv[1:], preexec_fn=processes.end_with_parent)  # noqa: PLW1509
    except OSError as error:
        print(f"launch: cannot start {sys.argv[1]}: {error.strerror}", file=sys.stderr)
        return 127
    while (status := child.poll()) is None and os.getppid() == parent:
        time.sleep(POLL_S)
    _, stuck = processes.sweep()
    if stuck:
        print(f"launch: processes that cannot be killed: {stuck}", file=sys.stderr)
    if status is None:
        return 1
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
