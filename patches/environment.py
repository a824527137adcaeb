"""What the launcher tells a process through its environment."""

import os


def node_ranks() -> int | None:
    """Return how many ranks this node runs, as torchrun says; None where nobody says.

    Raises:
        ValueError: LOCAL_WORLD_SIZE is no number of ranks.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"LOCAL_WORLD_SIZE={text}: not a number of ranks per node; unset it, or give 1 or more.")
    return int(text)


def has_one_queue() -> bool:
    """Return whether all streams of a GPU share one queue (CUDA_DEVICE_MAX_CONNECTIONS=1)."""
    return os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
