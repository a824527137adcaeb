"""Accuracy of the planner on published measurements, and the time of its search.

    python -m tests.benchmarks.planner [--golden FOLDER] [--worst N] [--regrets] [--cross-validate] [--plain-names]

The last line is one JSON object. `--golden` reads files with the names and columns of `megatron/longseq/planner/data/
golden` from another folder, for instance rows that no constant was fitted to.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.longseq.planner.plan.bounds import PlanningProblem
from megatron.longseq.planner.plan.cluster import cluster
from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.model import architecture
from megatron.longseq.planner.plan.search import branch_and_bound
from megatron.longseq.planner.plan.step import predict
from megatron.longseq.planner.plan.task import planning_task
from tests.benchmarks.planner_accuracy import Accuracy, Judged, assess, describe_regrets, judge, report
from tests.benchmarks.planner_golden import GoldenRow, rows

SECONDS = ("vtrain", "bloom", "sc21", "simumax_cp", "nemo_long")
# The fitted constants of the A100, with values to choose from, and the rows to which they are fitted.
FITTED: dict[str, tuple[float, ...]] = {
    "product_efficiency": (0.75, 0.77, 0.79, 0.81, 0.83, 0.85, 0.87),
    "data_efficiency": (0.3, 0.4, 0.5, 0.6, 0.7),
}
FITTED_TO = ("vtrain", "sc21")
SPLITS = 8
INSTALLED = ("vtrain", "bloom", "sc21")
SOFTWARE = ("transformer_impl", "attention_backend")


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


def cross_validate(judged: Sequence[Judged]) -> dict[str, tuple[float, float]]:
    """Return, by family, the errors of halves that the constants were fitted to, and of the other halves.

    The rows of every family are split at random several times. The constants that minimize the mean of the families'
    errors on one half judge the other.
    """
    errors = {family: [_errors(one.row) for one in judged if one.row.family == family] for family in FITTED_TO}
    cells = range(len(next(iter(errors.values()))[0]))
    fitted: dict[str, list[float]] = {family: [] for family in errors}
    held: dict[str, list[float]] = {family: [] for family in errors}
    for seed, first in itertools.product(range(SPLITS), (True, False)):
        halves = {}
        for family, rows_of in errors.items():
            order = random.Random(seed).sample(rows_of, len(rows_of))
            one, two = order[: len(order) // 2], order[len(order) // 2 :]
            halves[family] = (one, two) if first else (two, one)
        best = min(cells, key=lambda cell: sum(_mean(train, cell) for train, _ in halves.values()))
        for family, (train, test) in halves.items():
            fitted[family].append(_mean(train, best))
            held[family].append(_mean(test, best))
    return {family: (statistics.mean(fitted[family]), statistics.mean(held[family])) for family in errors}


def _mean(errors: Sequence[Sequence[float]], cell: int) -> float:
    return statistics.mean(row[cell] for row in errors)


def _errors(row: GoldenRow) -> list[float]:
    """Return the absolute relative error of a row for every combination of constants."""
    model, machine, run = read(row.values)
    cells = [dict(zip(FITTED, values, strict=True)) for values in itertools.product(*FITTED.values())]
    assert row.seconds
    return [abs(predict(model, replace(machine, **cell), run).step_seconds / row.seconds - 1) for cell in cells]


def plain_names(judged: Sequence[Judged]) -> dict[str, tuple[float, float]]:
    """Return, by family, the errors of rows whose installation is not named: with a100 as their cluster.

    The first error is that of rows which state their software (local layers, unfused attention), the second that of
    rows with upstream's defaults.
    """
    found = {}
    for family in INSTALLED:
        rows_of = [one.row for one in judged if one.row.family == family and one.row.seconds]
        errors = []
        for software in (True, False):
            again = []
            for row in rows_of:
                values = {key: value for key, value in row.values.items() if software or key not in SOFTWARE}
                again.append(judge(replace(row, values={**values, "cluster": "a100"})))
            errors.append(statistics.mean(abs(one.seconds_error or 0.0) for one in again))
        found[family] = errors[0], errors[1]
    return found


def search_seconds() -> dict[str, float]:
    """Return the CPU seconds of searching the whole space of 1,024 and of 8,192 GPUs, for 65B at 128K tokens.

    A batch has 4M tokens, or 32M on 8,192 GPUs.
    """
    found = {}
    for gpus in (1024, 8192):
        machine = cluster(f"a800-{gpus}")
        task = planning_task(architecture("llama-65b", {}), machine, seq_length=1 << 17, global_batch_size=gpus // 32)
        began = time.process_time()
        branch_and_bound(PlanningProblem(task), machine.memory_bytes)
        found[f"seconds_{gpus}"] = time.process_time() - began
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures and return the exit status."""
    parser = argparse.ArgumentParser(description="accuracy of the planner on published measurements")
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="other files with the columns of the package's")
    parser.add_argument("--worst", type=int, default=3, metavar="N", help="print the N worst rows of every family")
    parser.add_argument("--regrets", action="store_true", help="list the runs of every group with a regret above 3 %%")
    parser.add_argument("--cross-validate", action="store_true", help="fit the constants to halves of the rows")
    parser.add_argument("--plain-names", action="store_true", help="name no installation: a100 for all A100 rows")
    parser.add_argument("--no-search", action="store_true", help="leave out the times of the search")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    judged, refused = [], 0
    for row in rows(args.golden):
        try:
            judged.append(judge(row))
        except ValueError as error:
            print(f"not priced: {error}")
            refused += 1
    accuracy = assess(judged)
    print(report(accuracy, args.worst))
    print(f"{len(judged)} rows in {time.perf_counter() - began:.1f} s")
    if args.regrets:
        print(describe_regrets(judged, 0.03))
    if args.cross_validate:
        for family, (fitted, held) in cross_validate(judged).items():
            print(f"{family}: {100 * fitted:.1f} % on the halves fitted to, {100 * held:.1f} % on the others")
    if args.plain_names:
        for family, (stated, default) in plain_names(judged).items():
            print(f"{family} as a100: {100 * stated:.1f} % with its software's flags, {100 * default:.1f} % without")
    result = figures(judged, accuracy) | {"not_priced": refused}
    if not args.no_search:
        result |= search_seconds()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
