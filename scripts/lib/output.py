"""Write to the console without depending on it: it may be gone or full, or nobody may read it.

Bytes go straight to the file descriptor. A signal handler writes too, and a buffer may be in use when the signal comes.
"""

import os
import select
import time
from typing import TextIO

PATIENCE_S = 1.0


def write(stream: TextIO | None, data: bytes, seconds: float | None = None) -> bool:
    """Write to stdout or stderr. What it does not take is dropped.

    Args:
        stream: where to write; None, which Python puts in the place of a stream that was closed before its start.
        data: what to write.
        seconds: how long to wait for a reader that is behind; None: as long as it takes.

    Returns:
        Whether the console took everything.
    """
    end = None if seconds is None else time.monotonic() + seconds
    try:
        return stream is not None and _write(stream.fileno(), data, end)
    except (OSError, ValueError):  # ValueError: the stream is closed
        return False


def _write(number: int, data: bytes, end: float | None) -> bool:
    while data:
        left = None if end is None else max(0.0, end - time.monotonic())
        if not select.select([], [number], [], left)[1]:
            return False
        try:
            data = data[os.write(number, data[: select.PIPE_BUF]) :]  # a pipe that is ready takes as much at once
        except BlockingIOError:  # another program has made it non-blocking
            time.sleep(0.01)
    return True
