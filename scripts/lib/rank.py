"""Send the output of one rank to a file of its own, and run its command.

    python rank.py FOLDER COMMAND...

torchrun starts this for each rank. The file is named by the global rank and the host. The command takes this process
over, so that signals and exit status are its own.
"""

import os
import socket
import sys
from pathlib import Path


def log_name(rank: int, host: str) -> str:
    """Return the name of a rank's log file."""
    return f"rank-{rank:05d}-{host}.log"


def host_name() -> str:
    """Return the name of this node: slurm's, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def main() -> None:
    """Open the file, make it stdout and stderr, and execute the command."""
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    file = folder / log_name(int(os.environ["RANK"]), host_name())
    try:
        output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        sys.exit(f"error: rank {os.environ['RANK']} cannot write its log {file}: {error.strerror}")
    sys.stdout.flush()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    # A file is not a terminal, so Python would keep the output back until its buffer is full.
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.environ["LONGSEQ_START_FOLDER"] = str(folder.parent)  # the default of --start-folder
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
