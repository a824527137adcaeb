"""Accuracy of the planner on published measurements, and the time of its search.

    python -m tests.benchmarks.planner [--golden FOLDER] [--worst N]

The last line is one JSON object. `--golden` reads files with the names and columns of `megatron/longseq/planner/data/
golden` from another folder, for instance rows that no constant was fitted to.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.longseq.planner.tools.accuracy import Accuracy, Judged, assess, judge, report
from megatron.longseq.planner.tools.golden import rows

SECONDS = ("vtrain", "bloom", "sc21", "simumax_cp", "nemo_long")
BYTES = ("nvidia_ci", "simumax", "simumax_cp")


def figures(judged: Sequence[Judged], accuracy: Accuracy) -> dict[str, Any]:
    """Return the figures of the last line, without those of the search."""
    errors = [abs(one.memory_error) for one in judged if one.memory_error is not None and one.row.is_consistent]
    return {
        "memory_error_mean": sum(errors) / len(errors) if errors else None,
        "memory_error_worst": max(errors, default=None),
        "seconds_error": {family: accuracy.seconds[family] for family in SECONDS if family in accuracy.seconds},
        "fits_wrong": len(accuracy.fits_wrong),
        "regret_worst": max(accuracy.regret.values(), default=None),
        "regret_mean": sum(accuracy.regret.values()) / max(1, len(accuracy.regret)),
        "rank": accuracy.rank,
    }


def search_seconds() -> dict[str, float | None]:
    """Return the seconds of searching the whole space of 1,024 and 8,192 GPUs; None while there is no search."""
    try:
        from megatron.longseq.planner.tools.timing import search_times
    except ImportError:
        return {"seconds_1024": None, "seconds_8192": None}
    return search_times()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures and return the exit status."""
    parser = argparse.ArgumentParser(description="accuracy of the planner on published measurements")
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="other files with the columns of the package's")
    parser.add_argument("--worst", type=int, default=3, metavar="N", help="print the N worst rows of every family")
    parser.add_argument("--no-search", action="store_true", help="leave out the times of the search")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    judged = [judge(row) for row in rows(args.golden)]
    accuracy = assess(judged)
    print(report(accuracy, args.worst))
    print(f"{len(judged)} rows in {time.perf_counter() - began:.1f} s")
    result = figures(judged, accuracy)
    if not args.no_search:
        result |= search_seconds()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
