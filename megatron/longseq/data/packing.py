"""Pack documents into samples by their lengths."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

OPEN = 64  # packs that documents may still join; bounds the time, and how far a document moves


def pack_in_order(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Pack documents whole: each one joins the first open pack that it fits into (first fit).

    Args:
        lengths: tokens of each document.
        capacity: tokens of a pack. A longer document is a pack of its own.

    Returns:
        The numbers of the documents of each pack, in the order of the packs' first documents.
    """
    packs: list[list[int]] = []
    room: list[int] = []  # tokens left in each pack
    first_open = 0
    for number, length in enumerate(int(length) for length in lengths):
        start = max(first_open, len(packs) - OPEN)
        found = next((pack for pack in range(start, len(packs)) if room[pack] >= length), None)
        if found is None:
            packs.append([number])
            room.append(capacity - length)
        else:
            packs[found].append(number)
            room[found] -= length
        while first_open < len(packs) and room[first_open] <= 0:
            first_open += 1
    return packs
