"""Is the two-node bed what it says? Its links' real rates, and whether they carry what collectives should send.

python -m tests.benchmarks.twonodes_check [--between MB/S] [--ratio 10]
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from tests.benchmarks.twonodes import Bed, BedError, Counters, Rates, two_nodes
from tests.pool import RankPool

TOLERANCE = 0.1
BETWEEN = 20e6
RATIO = 10.0
SECONDS = 0.5  # that a measurement keeps a link busy
TIMES = 3


class Pace(NamedTuple):
    """What links are measured to do.

    Attributes:
        rates: bytes per second of a node's links.
        latency: least seconds of a small message between nodes, and inside one.
    """

    rates: Rates
    latency: Rates


def pace_on_this_rank(asked: Rates, ranks: int) -> dict[str, list[tuple[float, float]]]:
    """Exchange messages with a rank of the other node, then with the next rank of this one; all ranks at once.

    Args:
        asked: the links' rates.
        ranks: of a node; with one alone there is no inside.

    Returns:
        Of each link: (bytes, seconds) of every exchange, the first ones tiny.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    first = rank // ranks * ranks
    peers = {"between": ((rank + ranks) % (2 * ranks),) * 2}
    if ranks > 1:
        peers["inside"] = (first + (rank + 1) % ranks, first + (rank - 1) % ranks)
    found: dict[str, list[tuple[float, float]]] = {}
    for link, (following, before) in peers.items():
        large = int(getattr(asked, link) * SECONDS / ranks)
        found[link] = [(size, _exchange(size, following, before)) for size in [64] * 3 * TIMES + [large] * TIMES]
    return found


def _exchange(size: int, following: int, before: int) -> float:
    send, receive = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    dist.barrier()
    start = time.perf_counter()
    # Received first: gloo says that it is ready over the same connection, and that would wait behind the message.
    works = [dist.irecv(receive, before), dist.isend(send, following)]
    for work in works:
        work.wait()
    return time.perf_counter() - start


def measure(bed: Bed) -> Pace:
    """Measure a bed's links, each kept busy by all ranks of a node."""
    results = bed.run(pace_on_this_rank, bed.rates, bed.ranks)
    rates, latency = {}, {}
    for link in results[0]:
        slowest = [
            (size, max(rank[link][turn][1] for rank in results)) for turn, (size, _) in enumerate(results[0][link])
        ]
        latency[link] = min(seconds for size, seconds in slowest if size == 64)  # a wait for a core is no link's
        rates[link] = statistics.median(bed.ranks * size / seconds for size, seconds in slowest if size != 64)
    if "inside" not in rates:
        rates["inside"], latency["inside"] = bed.rates.inside, latency["between"]
    return Pace(Rates(**rates), Rates(**latency))


def gather_on_this_rank(size: int) -> None:
    """Run one all-gather over all ranks, in their order."""
    dist.init_process_group("gloo")
    whole = torch.zeros(size, dtype=torch.uint8)
    dist.barrier()
    dist.all_gather_into_tensor(whole, whole.chunk(dist.get_world_size())[dist.get_rank()].clone())
    dist.barrier()


def carried(bed: Bed, size: int) -> tuple[Counters, Counters]:
    """Return what links carry for an all-gather of some bytes over all ranks, and what its ring should send."""
    before = bed.counters()
    bed.run(gather_on_this_rank, 0)
    between = bed.counters()
    bed.run(gather_on_this_rank, size)
    rest = bed.counters().since(between)
    talk = between.since(before)  # rendezvous and barriers
    sent = size // bed.world_size * (bed.world_size - 1)
    nodes = len(bed.pair)
    return rest.since(talk), Counters((sent,) * nodes, (sent * (bed.ranks - 1),) * nodes)


def confirm(bed: Bed, pace: Pace, tolerance: float) -> None:
    """Refuse emulated nodes whose links differ from the requested rates by more than a given share.

    Raises:
        BedError: by how much.
    """
    if pace.rates.off(bed.rates) > tolerance:
        raise BedError(
            f"links of {shown(pace.rates)} were measured where {shown(bed.rates)} were asked, more than "
            f"{tolerance:.0%} off: this machine is busy, or too slow for them. Wait, or give lower --between"
        )


def shown(rates: Rates) -> str:
    """Return rates as text."""
    return f"{rates.between / 1e6:.1f} MB/s between and {rates.inside / 1e6:.1f} MB/s inside nodes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status: 0 all as asked, 1 not, or no bed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.twonodes_check", description=__doc__)
    add_rates(parser)
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as logs, two_nodes(RankPool(Path(logs)), rates_of(given)) as bed:
            pace = measure(bed)
            print(f"asked {shown(bed.rates)}; measured {shown(pace.rates)}")
            print(
                f"latency {pace.latency.between * 1e6:.0f} us between, {pace.latency.inside * 1e6:.0f} us inside nodes"
            )
            links, ring = carried(bed, 2**24)
            print(f"an all-gather of {2**24} bytes: links carry {links}, its ring sends {ring}")
            confirm(bed, pace, given.tolerance)
    except BedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def add_rates(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how fast links are."""
    parser.add_argument(
        "--between", type=float, default=BETWEEN / 1e6, help="MB/s of a node's cable (default %(default)s)"
    )
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share that links may be off (%(default)s)")
    parser.add_argument("--ratio", type=float, default=RATIO, help="loopback over cable (default %(default)s)")


def rates_of(given: argparse.Namespace) -> Rates:
    """Return the rates that flags ask for."""
    return Rates(given.between * 1e6, given.between * given.ratio * 1e6)


if __name__ == "__main__":
    sys.exit(main())
