"""What a layer took in vTrain's single-node rows, by hidden size, tensor-parallel size and micro-batch.

    python -m tests.benchmarks.planner_cells [--golden FOLDER]

Rows of one cell (the same hidden size, tensor-parallel size and micro-batch) differ in layers, batch, pipeline and
data parallelism. For each cell, least squares fit their milliseconds by

    constant + layer * slots + head * micro-batches + pipeline terms + parameters + data-parallel parameters

where slots are the layers of a pipeline rank times micro-batches plus P - 1. The table shows the milliseconds of a
layer (forward and backward of one micro-batch), the planner's, and the mean error of the fit. A line below says how far
rows that differ in layers alone are from straight lines. The last line is JSON.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron.longseq.command_line import markdown_table
from megatron.longseq.planner.plan.flags import read
from megatron.longseq.planner.plan.step import stage_seconds
from tests.benchmarks.planner_golden import GoldenRow, rows

VOCABULARY = 50304
FEWEST = 14  # rows of a cell: twice as many as coefficients


class Cell(NamedTuple):
    """A cell of the table.

    Attributes:
        hidden, tensor, micro_batch: what its rows have in common.
        rows: their number.
        layer: fitted milliseconds of a layer.
        predicted: the planner's.
        error: mean relative error of the fit.
    """

    hidden: int
    tensor: int
    micro_batch: int
    rows: int
    layer: float
    predicted: float
    error: float


def cells(found: Sequence[GoldenRow]) -> list[Cell]:
    """Return the cells of some rows that are large enough for the fit."""
    groups: defaultdict[tuple[int, int, int], list[GoldenRow]] = defaultdict(list)
    for row in found:
        values = row.values
        key = values["hidden_size"], values["tensor_model_parallel_size"], values["micro_batch_size"]
        groups[int(key[0]), int(key[1]), int(key[2])].append(row)
    return [_cell(key, same) for key, same in sorted(groups.items()) if len(same) >= FEWEST]


def _cell(key: tuple[int, int, int], same: Sequence[GoldenRow]) -> Cell:
    terms, times, predicted = [], [], []
    for row in same:
        model, machine, run = read(row.values)
        stages, count = run.pipeline_model_parallel_size, run.microbatches
        layers = model.num_layers / stages
        params = (layers * 12 * model.hidden_size + VOCABULARY) * model.hidden_size / run.tensor_model_parallel_size
        data = (run.data_parallel_size - 1) / run.data_parallel_size
        piped = float(stages > 1)
        terms.append(
            [1, layers * (count + stages - 1), count, piped, piped * (count + stages - 1), params, data * params]
        )
        times.append(1e3 * (row.seconds or 0.0))
        predicted.append(1e3 * stage_seconds(model, machine, run)[0].both / layers)
    matrix, measured = np.array(terms), np.array(times)
    coefficients = np.linalg.lstsq(matrix / measured[:, None], np.ones(len(measured)), rcond=None)[0]
    error = float(np.abs(matrix @ coefficients / measured - 1).mean())
    return Cell(*key, len(same), float(coefficients[1]), min(predicted), error)


def distance_from_lines(found: Sequence[GoldenRow]) -> tuple[int, float]:
    """Return how far milliseconds are from a straight line through the layers.

    Args:
        found: rows. Those with data parallelism are left out, because their all-reduces depend on the layers too.

    Returns:
        The number of series of at least three rows that differ in layers alone, and the largest relative distance of
        a row from the line through the first and the last of its series.
    """
    series: defaultdict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for row in found:
        values = {name: str(value) for name, value in row.values.items()}
        layers, _, run = int(values.pop("num_layers")), *read(row.values)[1:]
        if run.data_parallel_size == 1:
            series[tuple(values.values())][layers] = row.seconds or 0.0
    worst, count = 0.0, 0
    for seconds in series.values():
        (low, first), *between, (high, last) = sorted(seconds.items()) if len(seconds) > 2 else [(0, 0.0)] * 2
        count += bool(between)
        for layers, measured in between:
            line = first + (last - first) * (layers - low) / (high - low)
            worst = max(worst, abs(measured / line - 1))
    return count, worst


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description="what a layer took in vTrain's single-node rows")
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="other files with the columns of the package's")
    args = parser.parse_args(argv)
    single = [row for row in rows(args.golden) if row.family == "vtrain_single"]
    found = cells(single)
    head = ("hidden", "tensor", "micro-batch", "rows", "layer ms", "predicted ms", "error of the fit")
    table = [(*map(str, one[:4]), f"{one.layer:.2f}", f"{one.predicted:.2f}", f"{one.error:.2%}") for one in found]
    print(markdown_table(head, table))
    count, worst = distance_from_lines(single)
    print(f"{count} series of rows that differ in layers alone: at most {worst:.1e} from straight lines")
    print(json.dumps([one._asdict() for one in found]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
