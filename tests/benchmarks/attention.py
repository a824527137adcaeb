"""Attention over ranks, ours beside yunchang, ring-flash-attn and PyTorch's own ring: time, memory, bytes, errors.

    python -m tests.benchmarks.attention [--ranks 2 4] [--lengths 4096 8192 16384] [--kv-heads 8 2] [--rounds 4]
        [--dtype float32] [--who ours yunchang ring-flash-attn torch]

Forward and backward of causal attention, 8 query heads of 64, on gloo ranks with one core and one thread each. Every
contestant runs in every round of one and the same job, in turns, each round in another order. CPU seconds are those of
the slowest rank, its communication threads included; where ranks share a core they are the figure and wall an upper
bound. Peak bytes are resident memory of the fullest rank beyond that before the call, results included. Errors are
against attention in float64 of the whole sequence, over its largest value.

The other implementations need a GPU as they come; `peers` says what they are given instead. They are installed by
`pip install "megatron-longseq[bench]"`; one that is missing is left out, and said so. The last line is one JSON object;
each of its figures is the geometric mean over the settings listed under `measured_at`. "Best" is the least, among all
configurations of all peers as among ours, for time and for memory apart: whether its gradients are right or not, or
("best right peer") of those whose results are right alone.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.longseq.attention.plan.heads import Heads
from tests.benchmarks.attention_contest import ONE_PROCESS, OURS, PEERS, Contestant, Size, contestants
from tests.benchmarks.attention_race import Job, run_on_this_rank
from tests.benchmarks.attention_report import rows, sent_bytes, summary, text
from tests.benchmarks.peers import obstacle
from tests.pool import RankPool

QUERY_HEADS = 8
SPEEDUP_LENGTH = 8192
TRIAL_LENGTH = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables and the JSON line."""
    given = _parser().parse_args(arguments)
    who, absent = _present(given.who)
    job = Job(_sizes(given, who), TRIAL_LENGTH, DTYPES[given.dtype])
    with tempfile.TemporaryDirectory() as logs:
        results = RankPool(Path(logs)).run(max(given.ranks), run_on_this_rank, job, timeout=3600)
    tried, measured = [one for one, _ in results], [many for _, many in results]
    table, sent = rows(measured), sent_bytes(tried)
    print("\n".join([*absent, text(table, tried[0], sent, given.dtype)]))
    print(json.dumps(summary(table, sent, given.dtype, DTYPES[given.dtype].itemsize)))
    return 0


def _parser() -> argparse.ArgumentParser:
    about, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.attention",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="each divides the largest")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens of a sequence")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2], help=f"beside {QUERY_HEADS} query heads")
    parser.add_argument("--rounds", type=int, default=4, help="at the shortest length; half at twice the length")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--who", nargs="+", choices=[OURS, *PEERS], default=[OURS, *PEERS])
    return parser


def _present(who: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return who can take part, and a line about each that cannot."""
    against = {one: obstacle(one) for one in who}
    return tuple(one for one, why in against.items() if not why), [
        f"{one}: {why}" for one, why in against.items() if why
    ]


def _sizes(given: argparse.Namespace, who: tuple[str, ...]) -> tuple[tuple[Size, tuple[Contestant, ...], int], ...]:
    """Return every size with its contestants and rounds.

    Raises:
        SystemExit: ranks that do not fit into one job.
    """
    if any(max(given.ranks) % ranks for ranks in given.ranks) or min(given.ranks) < 2:
        raise SystemExit(f"--ranks {given.ranks}: give numbers from 2 that divide the largest of them")
    together = tuple(one for ranks in sorted(given.ranks) for one in contestants(who, ranks))
    alone = tuple(contestants((ONE_PROCESS,), 1)) if OURS in who and 2 in given.ranks else ()
    speedup_length = SPEEDUP_LENGTH if SPEEDUP_LENGTH in given.lengths else max(given.lengths)
    sizes = []
    for length in sorted(given.lengths):
        for kv in given.kv_heads:
            rounds = max(1, given.rounds * min(given.lengths) // length)
            more = alone if length == speedup_length else ()
            sizes.append((Size(length, Heads(QUERY_HEADS, kv)), (*more, *together), rounds))
    return tuple(sizes)


if __name__ == "__main__":
    sys.exit(main())
