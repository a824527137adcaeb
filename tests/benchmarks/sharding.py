"""PaRO on two nodes: flat, serial hierarchical and overlapped collectives, and training under sharding strategies.

    python -m tests.benchmarks.sharding [--between 20] [--ratio 10] [--rounds 3] [--sizes 1 4 16 64]

Two nodes of two ranks are made on this machine (see `twonodes`; it takes root). A node's cable to the other has
--between MB/s, its loopback --ratio times as much; both are shared by its ranks, so links are --ratio times slower
between nodes link by link and rank by rank. What they really do is measured first; a bed that is off is refused, and
predictions take the measured rates.

Collectives travel in two ways: message by message, as the plan of the ring has them and the runtime does on gloo, and
by gloo's own. gloo's reduce-scatter sends an all-reduce's bytes, flat or not, and its pairs of ranks often work one way
at a time; messages do neither, so their ratios are those of the order alone, and their flat ring is the one to beat.

Arms of a ratio run in turns in one job, in another order each round; a ratio is the median of its rounds'. The last
line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.longseq.sharding.plan.rank_groups import RankGroups
from tests.benchmarks import sharding_arms as training
from tests.benchmarks import sharding_steps as steps
from tests.benchmarks.sharding_race import probe_on_this_rank, race_on_this_rank
from tests.benchmarks.sharding_report import BUCKETS, heats, links_of, measured, summary, text
from tests.benchmarks.twonodes import Bed, BedError, two_nodes
from tests.benchmarks.twonodes_check import Pace, add_rates, confirm, measure, rates_of, shown
from tests.pool import RankPool


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables and the JSON line, and return the exit status: 0, or 1 if no network can be built."""
    given = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as logs, two_nodes(RankPool(Path(logs)), rates_of(given)) as bed:
            found = _run(bed, given)
    except BedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(_rounded(found)))
    return 0


def _run(bed: Bed, given: argparse.Namespace) -> dict[str, Any]:
    pace = measure(bed)
    print(f"links of a node: {shown(pace.rates)} (asked {shown(bed.rates)})")
    confirm(bed, pace, given.tolerance)
    found: dict[str, Any] = {"asked": vars(bed.rates), "measured": vars(pace.rates)}
    if "collectives" in given.only:
        found |= _race(bed, pace, given)
    if "training" in given.only:
        found |= _train(bed, pace, given)
    return found


def _race(bed: Bed, pace: Pace, given: argparse.Namespace) -> dict[str, Any]:
    groups, links = RankGroups(bed.world_size, bed.ranks), links_of(pace, bed.ranks)
    probed = bed.run(probe_on_this_rank, groups.size)[0]
    sizes = [int(size * 2**20) for size in given.sizes]
    program = heats(groups, links, sizes, given.rounds, given.buckets)
    print(f"links of a rank: {links}\nas `probe` measures them: {probed}")
    results = measured(bed.run(race_on_this_rank, groups.size, program, timeout=3600), groups, links, probed)
    print(text(results))
    return summary(results)


def _train(bed: Bed, pace: Pace, given: argparse.Namespace) -> dict[str, Any]:
    groups, links = RankGroups(bed.world_size, bed.ranks), links_of(pace, bed.ranks)
    contestants = [arm for arm in training.arms(groups.size) if not given.arms or arm.name in given.arms]
    count = given.microbatches
    results = training.train(bed, contestants, rounds=given.training_rounds, steps=given.steps, microbatches=count)
    print(steps.text(results, links, groups, count))
    return steps.summary(results, links, groups, count)


def _parser() -> argparse.ArgumentParser:
    about, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.sharding",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rates(parser)
    parser.add_argument("--only", nargs="+", choices=["collectives", "training"], default=["collectives", "training"])
    parser.add_argument("--rounds", type=int, default=3, help="at the largest size; smaller ones have twice as many")
    parser.add_argument("--buckets", type=int, nargs="+", default=BUCKETS, help="to choose from (default: %(default)s)")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 4, 16, 64], help="MiB of a message")
    names = [arm.name for arm in training.arms(2)]
    parser.add_argument("--arms", nargs="+", choices=names, help="that train (default: all)")
    parser.add_argument("--training-rounds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--steps", type=int, default=3, help="of a run, that count")
    parser.add_argument("--microbatches", type=int, default=4, help="of a rank in a step")
    return parser


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
