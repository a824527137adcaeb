"""Show on the console what the first and the last rank write into their files."""

import re
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from scripts.lib.rank import log_name

POLL_S = 0.2
PREFIX = re.compile(rb"^\[rank\d+\]: ?")


class Follower(threading.Thread):
    """Copy the output of the first and the last rank of the job to stdout, line by line.

    Upstream prints messages on the first rank and the progress of the training on the last one.

    Args:
        folder: of the ranks' files.
        host: of this node. Files of other nodes are left to their own followers.
        shown: the ranks whose output is shown.
        has_host: whether a line begins with the host too.
    """

    def __init__(self, folder: Path, host: str, shown: set[int], has_host: bool) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.host = host
        self.shown = shown
        self.has_host = has_host
        self.is_over = threading.Event()
        self.streams: dict[int, BinaryIO] = {}
        self.rests: dict[int, bytes] = {}

    def run(self) -> None:
        """Follow the files until `finish` is called."""
        while not self.is_over.wait(POLL_S):
            self.copy()

    def finish(self) -> None:
        """Copy what is left and stop."""
        self.is_over.set()
        self.join(timeout=5)
        self.copy()
        for rank, rest in self.rests.items():
            if rest:
                self.show(rank, rest)
        for stream in self.streams.values():
            stream.close()

    def copy(self) -> None:
        """Copy the whole lines that have been written since the last call."""
        self.open()
        for rank, stream in self.streams.items():
            *lines, self.rests[rank] = (self.rests[rank] + stream.read()).split(b"\n")
            for line in lines:
                self.show(rank, line)
        sys.stdout.buffer.flush()

    def open(self) -> None:
        """Open the files that are shown, once they exist."""
        for rank in self.shown - self.streams.keys():
            file = self.folder / log_name(rank, self.host)
            if file.exists():
                self.streams[rank] = file.open("rb")
                self.rests[rank] = b""

    def show(self, rank: int, line: bytes) -> None:
        """Write one line with its rank."""
        where = f" {self.host}" if self.has_host else ""
        sys.stdout.buffer.write(f"[rank{rank}{where}]:".encode() + PREFIX.sub(b"", line) + b"\n")
