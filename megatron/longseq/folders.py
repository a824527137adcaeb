"""Check folders given by flags when the flags are parsed, not after hours of training."""

import os
from pathlib import Path


def refuse_unwritable(flag: str, folder: Path, advice: str) -> None:
    """Refuse a folder that this process cannot write to.

    A folder that does not exist is accepted if its nearest existing parent is writable.

    Args:
        flag: the flag and its value, for the message.
        folder: the folder to check. It need not exist.
        advice: what the user should give instead, for the message.

    Raises:
        ValueError: the folder, or its nearest existing parent, is not a writable folder.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{flag}: {existing} is not a folder that this process can write to; {advice}.")
