"""The memory of a rank between steps equals the formula, and full buckets are freed."""

from collections.abc import Callable

import pytest

from megatron.longseq.sharding.plan.memory import Model, memory
from megatron.longseq.sharding.plan.strategy import Level, Strategy
from megatron.longseq.sharding.runtime.bucket_storage import CAN_SWAP, IN_FLIGHT
from tests.distributed.sharding_bed import CASES, MORE, STEPS, RankRecord, groups_of

ALL = [
    pytest.param(case, marks=[pytest.mark.slow] * (case in MORE))
    for case in (*CASES, *MORE)
    if "serial" not in case and "flat, overlap" not in case
]


@pytest.mark.parametrize("case", ALL)
def test_a_rank_holds_what_the_formula_says(
    sharded_run: Callable[[str], list[RankRecord]], case: str, tell: Callable[[str], None]
) -> None:
    strategy, groups, ranks = Strategy.parse(case[:3]), groups_of(case), sharded_run(case)
    for seen in ranks:
        padded = sum(bucket.numel for bucket in seen.buckets)
        trained = sum(bucket.numel for bucket in seen.buckets if bucket.is_trained)
        formula = memory(strategy, groups, Model(padded, trained), seen.widths)
        assert len(seen.storages) == len(STEPS)
        for storages in seen.storages:
            assert (storages.params, storages.grads, storages.whole) == (formula.params, formula.grads, 0)
            assert storages.optimizer <= formula.optimizer  # it has states of parameters alone, and none of padding
    seen = ranks[0]
    copies = groups.ranks // groups.shards(strategy.optimizer)
    if "TP 2" not in case and "PP 2" not in case:
        states = sum(one.storages[-1].optimizer for one in ranks)
        assert states == copies * seen.numel * seen.widths.optimizer
    formula = memory(strategy, groups, Model(seen.all, seen.numel), seen.widths)
    storages = seen.storages[-1]
    tell(
        f"memory   {case}: bytes of a rank's parameters {storages.params} ({formula.params} by the formula), gradients "
        f"{storages.grads} ({formula.grads}), optimizer states {storages.optimizer} ({formula.optimizer})"
    )


@pytest.mark.parametrize("case", ALL)
def test_few_buckets_are_whole_at_once(sharded_run: Callable[[str], list[RankRecord]], case: str) -> None:
    strategy = Strategy.parse(case[:3])
    for seen in sharded_run(case):
        assert seen.units == (2 if strategy.params > Level.NONE else 0)  # the one in use, and the one that comes
        assert seen.gradients == (gradients(case, seen) if strategy.grads > Level.NONE else 0)


@pytest.mark.parametrize("case", ALL)
def test_steps_allocate_no_buffers_after_the_first_one_of_their_length(
    sharded_run: Callable[[str], list[RankRecord]], case: str
) -> None:
    """Full buckets and copies in the communication dtype use the memory of the first step."""
    strategy = Strategy.parse(case[:3])
    for seen in sharded_run(case):
        assert seen.allocations[0] == seen.allocations[1] and seen.allocations[2] == seen.allocations[3]
        assert seen.allocations[0] > 0 or not (strategy.params or strategy.grads) or not CAN_SWAP


def gradients(case: str, seen: RankRecord) -> int:
    """Return how many buckets of gradients are whole: the one that fills, and those that are sent as they are."""
    if "flat" in case or seen.widths.grad_wire != seen.widths.grad:
        return 1
    return min(1 + IN_FLIGHT, sum(bucket.is_trained for bucket in seen.buckets))
