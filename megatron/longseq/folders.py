"""Folders that flags name: refused when parsed, not after hours of training."""

import os
from pathlib import Path


def refuse_unwritable(flag: str, folder: Path, advice: str) -> None:
    """Refuse a folder in which this process could not write; one that is missing has to fit into its parents.

    Args:
        flag: as it was given, for the message.
        folder: need not exist.
        advice: what to give instead.

    Raises:
        ValueError: names the flag and the folder that is none.
    """
    found = folder.absolute()
    while not found.exists():
        found = found.parent
    if not found.is_dir() or not os.access(found, os.W_OK):
        raise ValueError(f"{flag}: {found} is no folder that this process may write to; {advice}.")
