"""Show on the console what the first and the last rank write into their files."""

import contextlib
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from scripts.lib import output
from scripts.lib.console import BUDGET, STEP, LineFilter
from scripts.lib.rank import log_name

POLL_S = 0.2
PREFIX = re.compile(rb"^\[rank\d+\]: ?")


class Follower(threading.Thread):
    """Copy the output of the first and the last rank of the job to stdout, line by line.

    Upstream prints messages on the first rank and the progress of the training on the last one. `LineFilter` chooses
    the lines. If the console is gone, nothing more is copied.

    Args:
        folder: of the ranks' files, inside the folder of this start.
        host: of this node. Files of other nodes are left to their own followers.
        shown: the ranks whose output is shown.
        has_host: whether a line begins with the host too.
        is_verbose: whether all their lines are shown.
        budget: see `LineFilter`.
    """

    def __init__(
        self,
        folder: Path,
        host: str,
        shown: set[int],
        has_host: bool,
        is_verbose: bool = False,
        budget: int | None = BUDGET,
    ) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.host = host
        self.shown = shown
        self.has_host = has_host
        self.is_over = threading.Event()
        self.chosen = bytearray()  # lines that are not written yet
        self.streams: dict[int, BinaryIO] = {}
        self.rests: dict[int, bytes] = {}
        self.filters = {} if is_verbose else {rank: LineFilter(folder.parent, budget) for rank in shown}
        self.is_summed_up = is_verbose

    def run(self) -> None:
        """Follow the files until `finish` is called, and copy what is left."""
        with contextlib.suppress(OSError):  # a file that cannot be read any more
            while not self.is_over.wait(POLL_S):
                if not self.copy():
                    break
            else:
                self.copy(is_last=True)
        for stream in self.streams.values():
            stream.close()

    def finish(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until what is left has been copied, but not for a console that nobody reads if the launch is stopped.

        Args:
            is_stopped: whether the launcher was told to end.
        """
        self.is_over.set()
        left = output.PATIENCE_S
        while self.is_alive() and left > 0:
            self.join(POLL_S)
            left -= POLL_S if is_stopped() else 0.0

    def copy(self, is_last: bool = False) -> bool:
        """Copy the whole lines that have been written since the last call.

        Args:
            is_last: whether to copy a line without an end too.

        Returns:
            Whether the console took them.
        """
        self.open()
        for rank, stream in self.streams.items():
            *lines, self.rests[rank] = (self.rests[rank] + stream.read()).split(b"\n")
            if is_last and self.rests[rank]:
                lines.append(self.rests[rank])
            for line in lines:
                self.show(rank, line)
        if is_last and not self.is_summed_up:  # no step came
            self.sum_up()
        data = bytes(self.chosen)
        self.chosen.clear()
        return output.write(sys.stdout, data)

    def open(self) -> None:
        """Open the files that are shown, once they exist."""
        for rank in self.shown - self.streams.keys():
            file = self.folder / log_name(rank, self.host)
            if file.exists():
                self.streams[rank] = file.open("rb")
                self.rests[rank] = b""

    def show(self, rank: int, line: bytes) -> None:
        """Choose one line, and put its rank before it."""
        line = PREFIX.sub(b"", line)
        text = line.decode(errors="replace")
        if rank in self.filters and not self.filters[rank].shows(text):
            return
        if not self.is_summed_up and STEP.search(text):
            self.sum_up()
        where = f" {self.host}" if self.has_host else ""
        self.chosen += f"[rank{rank}{where}]:".encode() + line + b"\n"

    def sum_up(self) -> None:
        """Say what was left out before the first step, or in a run without one, and where it is."""
        self.is_summed_up = True
        for rank, chosen in self.filters.items():
            if rank in self.streams and chosen.summary():
                where = f"launch: rank {rank}: {chosen.summary()} are in {self.folder / log_name(rank, self.host)}\n"
                self.chosen += where.encode()
