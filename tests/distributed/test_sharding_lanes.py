"""Collectives over gloo give the plain sum in every mode, bitwise even if ranks are late, and count their bytes."""

from collections.abc import Callable
from itertools import product
from math import inf

import pytest
import torch

from megatron.longseq.distributed import SentCounter
from megatron.longseq.sharding.plan.collectives import CollectiveKind, CollectivesMode, Scope, full_collective
from megatron.longseq.sharding.plan.comm_volume import volume
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import LinkSpeed
from tests.distributed.lanes_bed import Case, Result, collect, places, probed, probed_flag, run_without_one_rank
from tests.pool import RankPool

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WAYS = tuple(product(CollectiveKind, CollectivesMode))
WHOLE_NUMBERS = [Case(kind, mode, 2, dtype, mean) for kind, mode in WAYS for dtype in DTYPES for mean in (False, True)]
WHOLE_NUMBERS += [Case(kind, mode, size, shard=1) for kind, mode in WAYS for size in (1, 4)]
MESSAGES = [case._replace(messages=True) for case in WHOLE_NUMBERS]
PAIRS = [Case(kind, mode, size, torch.bfloat16) for kind, mode in WAYS for size in (1, 2)]


@pytest.mark.parametrize(
    ("ranks_", "cases"),
    [(4, WHOLE_NUMBERS), (4, MESSAGES), (2, PAIRS)],
    ids=["4 ranks", "4 ranks, messages", "2 ranks"],
)
def test_each_way_is_the_plain_collective_and_sends_the_formulas_bytes(
    ranks: RankPool, ranks_: int, cases: list[Case]
) -> None:
    results: list[list[Result]] = ranks.run(ranks_, collect, cases)
    for index, case in enumerate(cases):
        groups = RankGroups(ranks_, case.size)
        collectives = full_collective(case.kind, groups, case.mode)
        shard = case.shard * case.dtype.itemsize * case.buckets
        formula = volume(collectives, groups, shard, case.buckets)
        for result in (of_rank[index] for of_rank in results):
            assert result.is_right, case
            assert _bytes(result.sent) == _bytes(result.given), case
            assert case.messages or result.sent == result.given, case
            assert _bytes(result.sent) == {
                Scope.INSIDE: formula.inside,
                Scope.BETWEEN: formula.between,
                Scope.FLAT: formula.flat,
            }, case
            assert sum(sent.messages for sent in result.sent.values()) == formula.collectives, case


def _bytes(sent: dict[Scope, SentCounter]) -> dict[Scope, int]:
    return {scope: one.bytes for scope, one in sent.items()}


def test_overlapped_ones_are_the_serial_ones_to_the_bit(ranks: RankPool) -> None:
    ways = [
        (CollectivesMode.HIERARCHICAL, 1),
        (CollectivesMode.OVERLAPPED, 1),
        (CollectivesMode.OVERLAPPED, 1),
        (CollectivesMode.OVERLAPPED, 5),
    ]
    problems = [*product((CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_REDUCE), (torch.float32, torch.bfloat16))]
    cases = [
        Case(kind, mode, 2, dtype, buckets=6, shard=1000, is_whole=False, lag=lag)
        for kind, dtype in problems
        for mode, lag in ways
    ]
    for of_rank in ranks.run(4, collect, cases):
        for at in range(0, len(cases), len(ways)):
            serial, *others = of_rank[at : at + len(ways)]
            assert len({len(serial.buckets), *map(len, serial.buckets)}) == 2 and len(set(serial.buckets)) == 6
            assert all(other.buckets == serial.buckets for other in others), cases[at]


@pytest.mark.parametrize(
    ("lists", "size", "inside", "between"),
    [
        ([(0, 1, 2, 3)], 2, [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ([(0, 2), (1, 3)], 1, [None] * 4, [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ([(0, 1), (2, 3)], 2, [[0, 1], [0, 1], [2, 3], [2, 3]], [None] * 4),
    ],
)
def test_every_data_parallel_group_has_its_own_in_logical_order(
    ranks: RankPool, lists: list[tuple[int, ...]], size: int, inside: list, between: list
) -> None:
    for rank, (member, logical, right, named) in enumerate(ranks.run(4, places, lists, size)):
        own = next(one for one in lists if rank in one)
        assert (own[member], logical) == (rank, right)
        assert named.pop("flat") == list(RankGroups(len(own), size).ordered(own))
        assert named == {
            name: want[rank] for name, want in (("inside", inside), ("between", between)) if want[rank] is not None
        }


def test_a_rank_that_stays_away_is_an_error_in_time(ranks: RankPool) -> None:
    (message, seconds), _ = ranks.run(2, run_without_one_rank)
    assert message.startswith("rank 0: reduce-scatter inside of bucket 5 of gradients failed: RuntimeError")
    assert seconds > 0.9


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_measure_the_same_links(ranks: RankPool, size: int, tell: Callable[[str], None]) -> None:
    (links, timed, seconds), *others = ranks.run(4, probed, size)
    assert all(other[:2] == (links, timed) for other in others)
    assert (
        links.inside != LinkSpeed(inf)
        and (links.between == LinkSpeed(inf)) is (size == 4)
        and 1 <= links.channels <= size
    )
    scopes = [Scope.INSIDE, Scope.BETWEEN, Scope.FLAT] if size == 2 else [Scope.INSIDE, Scope.FLAT]
    assert [(one.collective.scope, one.shard) for one in timed] == [(s, n) for s in scopes for n in (2**10, 2**12)]
    assert all(one.collective.kind is CollectiveKind.REDUCE_SCATTER and one.seconds > 0 for one in timed)
    tell(f"links of 4 gloo ranks in groups of {size}: {links}, probed in {seconds:.2f} s")


def test_the_probe_prints_the_flag_on_the_first_rank_alone(ranks: RankPool) -> None:
    first, *others = ranks.run(4, probed_flag, 2)
    assert first is not None and others == [None] * 3
    flag, inside, between = first.splitlines()[0].split()
    assert flag == "--paro-links" and float(inside) > 0 < float(between)
