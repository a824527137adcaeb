"""FlexSP on CPU ranks: real training steps on a long-tailed corpus, against every static degree.

    python -m tests.benchmarks.flexsp_measured [--ranks 2 4] [--steps N]

For each number of ranks a short profile fits the cost model (`--flexsp-refit`). Then the planner's plans and those of
each static degree train on the same documents from the same weights, in one run each, one thread a rank, float32. The
time is that of the passes of a step on the slowest rank; a row shows the mean over the steps after the first two, and
the mean prediction of the fitted model. All ranks together just hold the longest document, so that smaller static
degrees cannot and are left out.

The last line is one JSON object: `measured_over_best_static` (of the most ranks, the seconds of the best static degree
over the flexible ones) and `predicted_over_best_static` (the same by the model), and all rows.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy

from tests.packed_corpus import write_documents
from tests.pool import RankPool

MODEL = """
--num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 384 --swiglu --normalization RMSNorm
--position-embedding-type rope --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
--untie-embeddings-and-output-weights --micro-batch-size 1 --lr 1e-4 --lr-decay-iters 1000
--make-vocab-size-divisible-by 64 --eval-iters 0 --eval-interval 1000 --num-workers 0 --seed 1
--transformer-impl local --flexsp --log-interval 1
"""
LONGEST, DOCUMENTS = 4096, 48
WARM = 2  # steps that are not measured
LINE = re.compile(r"flexsp step \d+: .*passes ([\d.]+) s, predicted ([\d.]+) s")


@dataclass(frozen=True)
class MeasuredRow:
    """A line of the table: seconds of a step, measured and predicted."""

    ranks: int
    plans: str
    seconds: float
    spread: float
    predicted: float


def document_lengths(count: int = 600, seed: int = 1) -> tuple[int, ...]:
    """Return log-normal lengths: half of them below 150 tokens, the longest cut at `LONGEST`."""
    lengths = numpy.random.default_rng(seed).lognormal(5.0, 1.5, count).astype(int)
    return tuple(int(one) for one in numpy.clip(lengths, 4, LONGEST + 1))


def train(pool: RankPool, ranks: int, flags: Sequence[str]) -> list[tuple[float, float]]:
    """Train, and return the (measured, predicted) seconds of every step, from the log of the first rank."""
    from tests.regression.arm import run_arm

    run_arm(pool, "O", ranks, [*MODEL.split(), *flags], timeout=3600)
    log = sorted(pool.logs.glob(f"job{pool.jobs:03d}-rank0.log"))[-1].read_text()
    return [(float(seconds), float(predicted)) for seconds, predicted in LINE.findall(log)]


def measure(pool: RankPool, folder: Path, ranks: int, steps: int) -> list[MeasuredRow]:
    """Return the rows of a number of ranks: flexible plans first, then every static degree."""
    data = write_documents(folder / f"corpus{ranks}" / "text", document_lengths(), 1)
    base = [*data, "--seq-length", str(LONGEST), "--max-position-embeddings", str(LONGEST)]
    base += ["--split", "1,0,0", "--global-batch-size", str(DOCUMENTS)]
    limit, cost = ["--flexsp-max-tokens-per-rank", str(LONGEST // ranks)], folder / f"cost{ranks}.json"
    train(pool, ranks, [*base, *limit, "--train-iters", "8", "--flexsp-refit", "--flexsp-save-cost", str(cost)])
    known = [*base, "--flexsp-cost", str(cost), "--train-iters", str(steps + WARM)]
    rows = [_row(ranks, "flexible", train(pool, ranks, [*known, *limit]))]
    degree = 1
    while degree <= ranks:
        if degree * (LONGEST // ranks) >= LONGEST:
            found = train(pool, ranks, [*known, *limit, "--flexsp-degrees", str(degree)])
            rows.append(_row(ranks, f"static {degree}", found))
        degree *= 2
    return rows


def _row(ranks: int, plans: str, steps: list[tuple[float, float]]) -> MeasuredRow:
    measured = [seconds for seconds, _ in steps[WARM:]]
    spread = (max(measured) - min(measured)) / mean(measured)
    return MeasuredRow(ranks, plans, mean(measured), spread, mean(predicted for _, predicted in steps[WARM:]))


def table(rows: Sequence[MeasuredRow]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| ranks | plans | seconds a step | spread | predicted |", "|--:|---|--:|--:|--:|"]
    lines += [f"| {r.ranks} | {r.plans} | {r.seconds:.3f} | {r.spread:.0%} | {r.predicted:.3f} |" for r in rows]
    return "\n".join(lines)


def summary(rows: Sequence[MeasuredRow]) -> dict[str, float]:
    """Return how many times as long the best static degree takes, on the most ranks."""
    most = max(row.ranks for row in rows)
    (flexible,) = (row for row in rows if row.ranks == most and row.plans == "flexible")
    static = [row for row in rows if row.ranks == most and row.plans != "flexible"]
    return {
        "measured_over_best_static": min(row.seconds for row in static) / flexible.seconds,
        "predicted_over_best_static": min(row.predicted for row in static) / flexible.predicted,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.flexsp_measured", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of CPU ranks")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        rows = [row for ranks in given.ranks for row in measure(pool, Path(folder), ranks, given.steps)]
    print(table(rows))
    print(json.dumps({**summary(rows), "rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
