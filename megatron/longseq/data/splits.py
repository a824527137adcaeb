"""Which documents upstream's `--split` gives to training, validation and test, and a `--split` that serves them."""

import json
import re
from argparse import Namespace
from itertools import accumulate, pairwise
from pathlib import Path

NAMES = ("train", "valid", "test")
DEFAULT = "969,30,1"  # upstream's, where --data-path comes without --split
MOCK = "1,1,1"  # upstream's, where --mock-data comes without --split


def shares(split: str, documents: int) -> list[range | None]:
    """Return the documents of train, valid and test; None for a part whose number in `split` is 0.

    Upstream rounds both ends of a part, so a small part of few documents may hold none of them.

    Raises:
        ValueError: `split` is not one to three numbers, or they add up to 0.
    """
    parts = [float(number) for number in re.findall(r"[.0-9]+", split)]
    if not 1 <= len(parts) <= len(NAMES) or sum(parts) <= 0:
        raise ValueError(f"--split {split}: one to three numbers are wanted, not all of them 0, such as {DEFAULT}")
    parts += [0.0] * (len(NAMES) - len(parts))
    ends = list(accumulate((part / sum(parts) for part in parts), initial=0.0))
    return [
        range(round(start * documents), round(stop * documents)) if stop > start else None
        for start, stop in pairwise(ends)
    ]


def without_documents(split: str, documents: int) -> list[str]:
    """Return the names of the parts that `split` asks for and that would hold no document."""
    return [
        name for name, share in zip(NAMES, shares(split, documents), strict=True) if share is not None and not share
    ]


def fitting(documents: int) -> list[str]:
    """Return upstream's flags with which every part that is asked for holds a document; none if its default does.

    Args:
        documents: how many there are, at least 1. With one there is no validation, with two no test.
    """
    if not without_documents(DEFAULT, documents):
        return []
    if documents == 1:
        return ["--split", "1,0,0", "--eval-iters", "0"]
    if documents == 2:
        return ["--split", "1,1,0"]
    held_out = max(1, round(0.03 * documents))
    return ["--split", f"{documents - held_out - 1},{held_out},1"]


def parts_with_data(args: Namespace) -> dict[str, bool]:
    """Return for train, valid and test whether upstream's data flags give it data; all False without any of the flags.

    Args:
        args: upstream's validated arguments.

    Raises:
        ValueError: --split is not one to three numbers.
    """
    if args.mock_data or args.data_path is not None or args.data_args_path is not None:
        split = args.split or (MOCK if args.mock_data else DEFAULT)
        return dict(zip(NAMES, (share is not None for share in shares(split, 0)), strict=True))
    if args.per_split_data_args_path is not None:
        return _parts_of_file(args.per_split_data_args_path)
    return {name: getattr(args, f"{name}_data_path") is not None for name in NAMES}


def _parts_of_file(file: str) -> dict[str, bool]:
    """Return which parts upstream's --per-split-data-args-path names; all, where it is not a file of this machine."""
    try:
        content = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError):
        return dict.fromkeys(NAMES, True)
    return {name: content.get(name) is not None for name in NAMES}
