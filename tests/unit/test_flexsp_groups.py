"""Communicators of FlexSP: connected when a plan uses them, once, and in an order in which no rank waits for ever."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.flexsp.plan.plan import StepPlan
from megatron.longseq.flexsp.runtime import groups
from megatron.longseq.flexsp.runtime.runner import StepRunner
from megatron.longseq.flexsp.runtime.steps import PlannedBatch
from tests.distributed.flexible_plans import random_plan
from tests.unit.flexsp_bed import COST

RANKS, DEGREES, KINDS = 8, (1, 2, 4, 8), ("ulysses", "ring", "hybrid")
Connected = tuple[str, tuple[int, ...]]  # what was sent, and the ranks of the communicator


@contextmanager
def fake_rank(rank: int) -> Iterator[None]:
    """Be one of several ranks, of which no other one exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Connected]:
    """Collect first messages, in order, in place of sending them."""
    found: list[Connected] = []

    class Recorded:
        def __init__(self, group: dist.ProcessGroup) -> None:
            self.group, self.ranks = group, tuple(dist.get_process_group_ranks(group))

        def all_to_all(self, sent: Any) -> None:
            assert sent.shape == (len(self.ranks),)
            found.append(("all-to-all", self.ranks))

        def post(self, sends: list[Any], receives: list[Any]) -> "Recorded":
            assert len(sends) == len(receives) == 1, "every rank of the communicator takes part"
            found.append((f"ring {id(self.group)}", self.ranks))
            return self

        def wait(self) -> None:
            """Wait for nothing."""

    monkeypatch.setattr(groups, "GroupCollectives", Recorded)
    monkeypatch.setattr(groups, "P2PChannel", Recorded)
    return found


def places() -> list[groups.Place]:
    found: list[groups.Place] = []
    for degree in DEGREES:
        for kind in COST.kinds(degree, KINDS):
            mesh = Mesh(kind.ulysses, kind.ring)
            found += [(mesh, tuple(range(start, start + degree))) for start in range(0, RANKS, degree)]
    return found


def used_by(plan: StepPlan, rank: int) -> set[tuple[int, ...]]:
    """Return the ranks of the all-to-alls and rings that a rank's groups of a plan have."""
    own = [group for one in plan.microbatches for group in one.groups if rank in group.ranks]
    used: set[tuple[int, ...]] = set()
    for group in own:
        kind, place = group.kind, group.ranks.index(rank)
        used |= (
            {tuple(group.ranks[place // kind.ulysses * kind.ulysses :][: kind.ulysses])} if kind.ulysses > 1 else set()
        )
        used |= {tuple(group.ranks[place % kind.ulysses :: kind.ulysses])} if kind.ring > 1 else set()
    return used


def test_a_plan_connects_what_it_uses_and_no_rank_waits_for_ever(messages: list[Connected]) -> None:
    plans = [random_plan((30, 60, 90, 200, 40, 50, 60 + step), RANKS, COST, DEGREES, KINDS) for step in range(4)]
    queues: list[list[Connected]] = []
    for rank in range(RANKS):
        with fake_rank(rank):
            runner = StepRunner(groups.open_groups(dist.group.WORLD, places()), 0, 1, report=None)  # type: ignore[arg-type]
            assert not messages, "nothing is sent before a plan wants it"
            for step, plan in enumerate(plans):
                before = {ranks for _, ranks in messages}
                runner._connect(PlannedBatch(step, range(7), (), plan))
                assert {ranks for _, ranks in messages} == before | used_by(plan, rank)
            assert len(set(messages)) == len(messages), "each communicator is connected once"
            queues.append([(kind.split()[0], ranks) for kind, ranks in messages])
            messages.clear()
    assert any(len(queue) > 8 for queue in queues)
    # A rank goes on when all ranks of a communicator have come to it.
    while any(queues):
        ready = [queue[0] for queue in queues if queue]
        done = next((one for one in ready if all(queues[rank][:1] == [one] for rank in one[1])), None)
        assert done is not None, f"ranks wait for one another: {ready}"
        for rank in done[1]:
            del queues[rank][0]


def test_one_rank_needs_no_communicator(messages: list[Connected]) -> None:
    with fake_rank(3):
        before = len(dist.distributed_c10d._world.pg_names)
        made = groups.open_groups(dist.group.WORLD, places())
        parts = [pg for pg in dist.distributed_c10d._world.pg_names if dist.get_world_size(pg) == 1]
        assert not parts and len(dist.distributed_c10d._world.pg_names) > before
        made.connect(made.strategy(Mesh(1, 1), (3,)))
        assert not messages
