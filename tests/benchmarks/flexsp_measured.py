"""FlexSP on CPU ranks: steps of real training on a long-tailed corpus, against every static degree.

    python -m tests.benchmarks.flexsp_measured [--rounds N] [--ranks 2 4]

In one run, plans with groups of unlike degrees and plans with one degree take turns on the same documents, round by
round and in another order each time, so that what slows the machine down slows all of them down. A ratio is the median
over the rounds. A run before it, with the same plans, fits the cost model (`--flexsp-refit`). All in float32, one
thread a rank. The time is that of the passes of a step on its slowest rank.

A static degree must hold the longest document. So memory for a part of it rules small degrees out; each number of ranks
is measured with memory for one of as many parts as ranks, and four ranks also with memory for a half.

The cost model says what is reachable: groups of one rank save messages and their start-up, while attention and linear
layers remain. It assumes a core for each rank. The ratio of the last line, a JSON object, is that of the most ranks
that have one; rows with more ranks are marked.
"""

import argparse
import json
import os
import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy

from tests.packed_corpus import write_documents
from tests.pool import RankPool

MODEL = """
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 192 --swiglu --normalization RMSNorm
--position-embedding-type rope --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
--untie-embeddings-and-output-weights --micro-batch-size 1 --lr 1e-4 --lr-decay-iters 1000
--make-vocab-size-divisible-by 64 --eval-iters 0 --eval-interval 1000 --num-workers 0 --seed 1
--transformer-impl local --flexsp --log-interval 1 --split 1,0,0
"""
LONGEST, DOCUMENTS = 4096, 24
BEDS = ((2, 2), (4, 4), (4, 2))  # ranks, and parts of the longest document of which a rank holds one
PROFILE, WARM = 4, 1  # rounds of the profile, and rounds before the measured ones
GOAL = 1.3
LINE = re.compile(r"flexsp step (\d+): .*passes ([\d.]+) s, predicted ([\d.]+) s")
PLAN = re.compile(r"planned step (\d+): (.*)")
PARTS = ("attention", "linear layers", "start-up", "all-to-alls", "rings")


@dataclass
class ArmTimes:
    """Times of one kind of plan in one bed, a value per round.

    Attributes:
        name: "flexible", "sorted", or "static D".
        measured, predicted: seconds of the passes of a step.
        bound: seconds that no plan of these documents is below, in the model.
        parts: predicted seconds by `PARTS`.
    """

    name: str
    measured: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    parts: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class MeasuredRow:
    """A line of the table.

    Attributes:
        ranks, tokens_per_rank: the bed.
        plans: name of the plans.
        seconds, predicted: medians over the rounds.
        spread: interquartile range of the measured times, relative to their median.
        ratio: seconds over those of the flexible plans of the same round, median.
        ratio_low, ratio_high: quartiles of this ratio.
        predicted_ratio: the ratio by the model.
    """

    ranks: int
    tokens_per_rank: int
    plans: str
    seconds: float
    predicted: float
    spread: float
    ratio: float
    ratio_low: float
    ratio_high: float
    predicted_ratio: float


def document_lengths(count: int = 600, seed: int = 1) -> tuple[int, ...]:
    """Return log-normal lengths: half of them below 150 tokens, the longest cut at `LONGEST`."""
    lengths = numpy.random.default_rng(seed).lognormal(5.0, 1.5, count).astype(int)
    return tuple(int(one) for one in numpy.clip(lengths, 4, LONGEST + 1))


def arms_of(ranks: int, tokens_per_rank: int) -> dict[str, dict[str, Any]]:
    """Return the kinds of plans of a bed: the flags that each of them changes."""
    arms: dict[str, dict[str, Any]] = {"flexible": {}, "sorted": {"flexsp_planner": "sorted"}}
    for degree in range(1, ranks + 1):
        if ranks % degree == 0 and degree * tokens_per_rank >= LONGEST:
            arms[f"static {degree}"] = {"flexsp_degrees": str(degree)}
    return arms


def place(step: int, arms: int) -> tuple[int, int]:
    """Return the round of a step, and which kind of plan it has: each round begins with another one."""
    number, turn = divmod(step, arms)
    return number, (turn + number) % arms


@contextmanager
def plans_in_turn() -> Iterator[Any]:
    """Let each round of steps train on the same documents, with one kind of plan after the other."""
    from megatron.training import get_args

    from megatron.longseq.flexsp.from_args import domain_ranks, planner_of
    from megatron.longseq.flexsp.refit import GroupSample, time_parts
    from megatron.longseq.flexsp.runtime.steps import Lookahead, PlannedBatch
    from tests.regression.planted import Planted, wrapped

    planted = Planted()

    def make(_: Any, lookahead: Any, step: int, cost: Any) -> Any:
        args = get_args()
        arms = arms_of(domain_ranks(args), cost.tokens_per_rank)
        number, arm = place(step, len(arms))
        samples = lookahead.batches.samples(number)
        lengths = tuple(lookahead.batches.length(sample) for sample in samples)
        plan = planner_of(Namespace(**{**vars(args), **list(arms.values())[arm]}))(lengths, cost=cost)
        slowest = [max(one.groups, key=lambda group: group.seconds) for one in plan.microbatches]
        parts = [
            time_parts(cost, GroupSample(group.kind, tuple(lengths[index] for index in group.sequences), group.seconds))
            for group in slowest
        ]
        if os.environ["RANK"] == "0":
            line = json.dumps({"bound": plan.bound, "parts": [sum(part) for part in zip(*parts, strict=True)]})
            print(f"planned step {step + 1}: {line}", flush=True)
        planted.times += 1
        return PlannedBatch(step, samples, lengths, plan)

    with wrapped(Lookahead, "_make", make):
        yield planted


def train(pool: RankPool, ranks: int, limit: int, rounds: int, flags: Sequence[str]) -> list[ArmTimes]:
    """Train rounds of all kinds of plans; return their times, from the log of the first rank."""
    from tests.regression.arm import run_arm

    names = list(arms_of(ranks, limit))
    given = [*MODEL.split(), *flags, "--train-iters", str(rounds * len(names))]
    run_arm(pool, "O", ranks, given, mutant="tests.benchmarks.flexsp_measured:plans_in_turn", timeout=1800)
    log = sorted(pool.logs.glob(f"job{pool.jobs:03d}-rank0.log"))[-1].read_text()
    plans = {int(step): json.loads(line) for step, line in PLAN.findall(log)}
    arms = [ArmTimes(name) for name in names]
    for step, seconds, predicted in LINE.findall(log):
        number, arm = place(int(step) - 1, len(names))
        if number >= WARM:
            arms[arm].measured.append(float(seconds))
            arms[arm].predicted.append(float(predicted))
            arms[arm].bound.append(plans[int(step)]["bound"])
            arms[arm].parts.append(plans[int(step)]["parts"])
    return arms


def measure(pool: RankPool, folder: Path, ranks: int, divisor: int, rounds: int) -> list[ArmTimes]:
    """Fit the cost model of a bed, and return the times of its plans."""
    data = write_documents(folder / f"corpus{ranks}-{divisor}" / "text", document_lengths(), 1)
    limit, cost = LONGEST // divisor, folder / f"cost{ranks}-{divisor}.json"
    base = [*data, "--split", "1,0,0", "--seq-length", str(LONGEST), "--max-position-embeddings", str(LONGEST)]
    base += ["--global-batch-size", str(DOCUMENTS), "--flexsp-max-tokens-per-rank", str(limit)]
    train(pool, ranks, limit, PROFILE, [*base, "--flexsp-refit", "--flexsp-save-cost", str(cost)])
    return train(pool, ranks, limit, rounds + WARM, [*base, "--flexsp-cost", str(cost)])


def rows_of(ranks: int, limit: int, arms: Sequence[ArmTimes]) -> list[MeasuredRow]:
    """Return the lines of a bed; the first of `arms` is what the others are compared with."""
    ours, rows = arms[0], []
    for arm in arms:
        low, middle, high = quantiles(arm.measured, n=4)
        ratios = [a / b for a, b in zip(arm.measured, ours.measured, strict=True)]
        least, ratio, most = quantiles(ratios, n=4)
        predicted = median(a / b for a, b in zip(arm.predicted, ours.predicted, strict=True))
        spread = (high - low) / middle
        rows.append(
            MeasuredRow(ranks, limit, arm.name, middle, median(arm.predicted), spread, ratio, least, most, predicted)
        )
    return rows


def best_static(arms: Sequence[ArmTimes]) -> ArmTimes:
    """Return the static degree with the shortest measured steps."""
    return min((arm for arm in arms if arm.name.startswith("static")), key=lambda arm: median(arm.measured))


def reachable(arms: Sequence[ArmTimes]) -> float:
    """Return how many times as fast as the best static degree any plan can be, in the model."""
    return median(a / b for a, b in zip(best_static(arms).predicted, arms[0].bound, strict=True))


def reason(arms: Sequence[ArmTimes]) -> str:
    """Return what the best static degree spends its time on, by the model, and what that lets other plans save."""
    static = best_static(arms)
    sums = [sum(values) for values in zip(*static.parts, strict=True)]
    shares = ", ".join(f"{name} {part / sum(sums):.0%}" for name, part in zip(PARTS, sums, strict=True) if part)
    most = reachable(arms)
    verdict = f"{GOAL}x is {'' if most >= GOAL else 'not '}reachable"
    return f"{static.name} by the model: {shares}; no plan is more than {most:.2f}x as fast, so that {verdict}"


def table(rows: Sequence[MeasuredRow], cores: int) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| ranks | tokens a rank | plans | seconds | spread | predicted | over flexible | quartiles | by model |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        mark = "" if r.ranks <= cores else "\\*"
        times = f"{r.seconds:.3f} | {r.spread:.0%} | {r.predicted:.3f}"
        ratios = f"{r.ratio:.2f} | {r.ratio_low:.2f} to {r.ratio_high:.2f} | {r.predicted_ratio:.2f}"
        lines.append(f"| {r.ranks}{mark} | {r.tokens_per_rank} | {r.plans} | {times} | {ratios} |")
    if any(r.ranks > cores for r in rows):
        lines.append(
            f"\n\\* These ranks share {cores} cores. The model has a core for each rank: with fewer, a rank that waits "
            "lets another one compute, so that balance gains less than it says, and messages cost the time of cores."
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.flexsp_measured", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    parser.add_argument("--ranks", type=int, nargs="+", choices=(2, 4), default=(2, 4), help="numbers of CPU ranks")
    given = parser.parse_args(arguments)
    cores, rows, beds = len(os.sched_getaffinity(0)), [], {}
    wanted = [bed for bed in BEDS if bed[0] in given.ranks]
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        for ranks, divisor in wanted:
            beds[ranks, divisor] = measure(pool, Path(folder), ranks, divisor, given.rounds)
            rows += rows_of(ranks, LONGEST // divisor, beds[ranks, divisor])
    print(table(rows, cores))
    for (ranks, divisor), arms in beds.items():
        print(f"{ranks} ranks, {LONGEST // divisor} tokens a rank: {reason(arms)}")
    # The headline needs a core for each rank; a machine with one core has none, and takes the fewest ranks.
    fitting = [bed for bed in wanted if bed[0] <= cores] or [min(wanted)]
    ranks, divisor = max(fitting)
    arms = beds[ranks, divisor]
    best = next(row for row in rows_of(ranks, LONGEST // divisor, arms) if row.plans == best_static(arms).name)
    out = {
        "measured_over_best_static": best.ratio,
        "measured_quartiles": [best.ratio_low, best.ratio_high],
        "predicted_over_best_static": best.predicted_ratio,
        "reachable_over_best_static": reachable(arms),
        "ranks": ranks,
        "cores": cores,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
