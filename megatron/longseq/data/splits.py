"""Compute which documents upstream's `--split` assigns to training, validation and test."""

import json
import re
from argparse import Namespace
from itertools import accumulate, pairwise
from pathlib import Path

NAMES = ("train", "valid", "test")
DEFAULT = "969,30,1"  # upstream's default with --data-path
MOCK = "1,1,1"  # upstream's default with --mock-data


def split_ranges(split: str, documents: int) -> list[range | None]:
    """Return the documents of the training, validation and test part.

    Upstream rounds both ends of a part. A small part of few documents may therefore be empty.

    Args:
        split: value of upstream's --split.
        documents: number of documents in the data set.

    Returns:
        A range for each part, or None for a part whose number in `split` is 0.

    Raises:
        ValueError: `split` is not one to three numbers, or all are 0.
    """
    parts = [float(number) for number in re.findall(r"[.0-9]+", split)]
    if not 1 <= len(parts) <= len(NAMES) or sum(parts) <= 0:
        raise ValueError(f"--split {split}: give one to three numbers that are not all 0, such as {DEFAULT}")
    parts += [0.0] * (len(NAMES) - len(parts))
    ends = list(accumulate((part / sum(parts) for part in parts), initial=0.0))
    return [
        range(round(start * documents), round(stop * documents)) if stop > start else None
        for start, stop in pairwise(ends)
    ]


def empty_parts(split: str, documents: int) -> list[str]:
    """Return the names of the parts that `split` asks for but that would hold no document.

    Args:
        split: value of upstream's `--split`, such as "969,30,1".
        documents: number of documents.
    """
    ranges = split_ranges(split, documents)
    return [name for name, part in zip(NAMES, ranges, strict=True) if part is not None and not part]


def suggest_split_flags(documents: int) -> list[str]:
    """Return upstream's flags with which no part is empty, or no flags if upstream's default achieves that.

    Args:
        documents: number of documents, at least 1. One document leaves no validation part, two leave no test part.
    """
    if not empty_parts(DEFAULT, documents):
        return []
    if documents == 1:
        return ["--split", "1,0,0", "--eval-iters", "0"]
    if documents == 2:
        return ["--split", "1,1,0"]
    held_out = max(1, round(0.03 * documents))
    return ["--split", f"{documents - held_out - 1},{held_out},1"]


def parts_with_data(args: Namespace) -> dict[str, bool]:
    """Return which of the parts train, valid and test get data from upstream's data flags.

    Args:
        args: upstream's validated arguments.

    Returns:
        A bool for each part. All are False if no data flag is given.

    Raises:
        ValueError: --split is not one to three numbers.
    """
    if args.mock_data or args.data_path is not None or args.data_args_path is not None:
        split = args.split or (MOCK if args.mock_data else DEFAULT)
        return dict(zip(NAMES, (part is not None for part in split_ranges(split, 0)), strict=True))
    if args.per_split_data_args_path is not None:
        return _parts_in_file(args.per_split_data_args_path)
    return {name: getattr(args, f"{name}_data_path") is not None for name in NAMES}


def reads_prepared(args: Namespace) -> bool:
    """Return whether the data flags name outputs of `prepare` or other indexed data sets, and nothing else."""
    flags = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    words = [word for flag in flags for word in getattr(args, flag, None) or ()]
    paths = [word for word in words if not re.fullmatch(r"[.0-9]+", word)]  # numbers are weights
    return bool(paths) and all(Path(f"{path}.idx").is_file() for path in paths)


def _parts_in_file(file: str) -> dict[str, bool]:
    """Return which parts upstream's --per-split-data-args-path names, or all if it is not a file on this machine."""
    try:
        content = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError):
        return dict.fromkeys(NAMES, True)
    return {name: content.get(name) is not None for name in NAMES}
