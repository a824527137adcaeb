"""What is on its way when: the end of a step takes a copy for the wire only of sums that are complete."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.longseq.sharding.collectives import Region
from megatron.longseq.sharding.core import Sharding
from megatron.longseq.sharding.groups import Groups
from megatron.longseq.sharding.phases import Phases
from megatron.longseq.sharding.stores import GradStore
from megatron.longseq.sharding.strategy import Strategy


class Job:
    """A job that is done when somebody waits for it, after the one that it is behind."""

    def __init__(self, region: Region, after: Callable[[], None] | None, behind: "Job | None") -> None:
        self.region, self.after, self.behind = region, after, behind

    def wait(self) -> None:
        """Do it, once."""
        if self.behind is not None:
            self.behind.wait()
        if self.after is not None:
            self.after()
        self.after = self.behind = None


class LazyLanes:
    """Lanes that are as late as they may be, and send nothing."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(
        self, phases: Phases, region: Region, label: str, after: Callable[[], None] | None = None, behind: Any = None
    ) -> Job:
        """Take a job."""
        self.jobs.append(Job(region, after, behind))
        return self.jobs[-1]


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
@pytest.mark.parametrize("triplet", ["NII", "NIG", "NGG"])
def test_all_micro_batches_are_in_what_ends_a_step(triplet: str, wire: torch.dtype | None) -> None:
    lanes = LazyLanes()
    sharding = Sharding(
        Strategy.parse(triplet),
        Groups(4, 2),
        1,
        lanes,
        is_flat=lambda phases, size: False,
        wire=wire,  # type: ignore[arg-type]
    )
    store = GradStore(sharding, 128, torch.float32, "cpu")
    store.close()
    for value in (1.0, 2.0, 4.0):
        store.open()
        assert not store.whole.flat.any()  # another micro-batch's are gone
        store.whole.flat += value
        store.reduce("a bucket")
    store.finish("a bucket").wait()
    assert store.owned.eq(7.0).all()
    assert lanes.jobs[-1].region.part.eq(7.0).all()  # what was sent last
    store.zero()
    assert not store.part.any() and not store.whole.is_there
