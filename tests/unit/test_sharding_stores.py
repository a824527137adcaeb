"""At the end of a step, gradients are copied to the communication dtype only once their sums are complete."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.longseq.sharding.plan.collectives import Collectives
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Strategy
from megatron.longseq.sharding.runtime import bucket_storage as stores
from megatron.longseq.sharding.runtime.bucket_storage import FullBucket, GradStore, ParamStore
from megatron.longseq.sharding.runtime.collectives import Region
from megatron.longseq.sharding.runtime.state import ShardingState


class Job:
    """A job that is done when somebody waits for it, after the one that it is behind."""

    def __init__(
        self,
        region: Region,
        after: Callable[[], None] | None,
        behind: "Job | None",
        before: Callable[[], None] | None,
    ) -> None:
        self.region, self.after, self.behind, self.before = region, after, behind, before
        self.is_done = False

    def start(self) -> None:
        """Do what comes before the collectives, once."""
        if self.behind is not None:
            self.behind.wait()
        if self.before is not None:
            self.before()
        self.behind = self.before = None

    def wait(self) -> None:
        """Run the job once."""
        self.start()
        if self.after is not None:
            self.after()
        self.after, self.is_done = None, True


class LazyLanes:
    """Lanes that are as late as they may be, and send nothing."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(
        self,
        collectives: Collectives,
        region: Region,
        label: str,
        after: Callable[[], None] | None = None,
        behind: Any = None,
        before: Callable[[], None] | None = None,
    ) -> Job:
        """Accept a job."""
        self.jobs.append(Job(region, after, behind, before))
        return self.jobs[-1]


def opened(triplet: str, wire: torch.dtype | None = None) -> tuple[ShardingState, LazyLanes]:
    lanes = LazyLanes()
    strategy, groups = Strategy.parse(triplet), RankGroups(4, 2)
    made = ShardingState(strategy, groups, 1, lanes, None, comm_dtype=wire)  # type: ignore[arg-type]
    return made, lanes


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
@pytest.mark.parametrize("triplet", ["NII", "NIG", "NGG"])
def test_all_micro_batches_are_in_what_ends_a_step(triplet: str, wire: torch.dtype | None) -> None:
    sharding, lanes = opened(triplet, wire)
    store = GradStore(sharding, 128, torch.float32, "cpu")
    store.release_full()
    for value in (1.0, 2.0, 4.0):
        store.prepare()
        assert not store.full.flat.any()  # another micro-batch's are gone
        store.full.flat += value
        store.reduce("a bucket")
    store.finish("a bucket").wait()
    assert store.owned.eq(7.0).all()
    assert lanes.jobs[-1].region.group_slice.eq(7.0).all()  # what was sent last
    store.zero()
    assert not store.shard.any() and not store.full.is_allocated


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
@pytest.mark.parametrize("triplet", ["NIG", "IIG", "III"])
def test_the_last_micro_batch_waits_for_none_of_its_buckets(triplet: str, wire: torch.dtype | None) -> None:
    """Two buckets may be in flight, and copies of their shards, 1/2 of a bucket each, in the memory of two buckets."""
    sharding, lanes = opened(triplet, wire)
    buckets = [GradStore(sharding, 128, torch.float32, "cpu") for _ in range(4)]
    for number, store in enumerate(buckets):
        store.release_full()
        store.prepare()
        store.full.flat += 1.0
        submitted = len(lanes.jobs)
        store.reduce("a bucket")
        store.finish("a bucket")
        assert not any(job.is_done for job in lanes.jobs[submitted:]), "waited for right after it was submitted"
        assert sum(job.is_done for job in lanes.jobs) == max(number - 1, 0), "the reduction two buckets before"
    for job in lanes.jobs:
        job.wait()
    assert all(store.owned.eq(1.0).all() for store in buckets)


class Allocations(TorchDispatchMode):
    """Counts tensors of numbers with storages of their own that are created."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.dtype.is_floating_point:
            self.count += out.untyped_storage()._cdata not in inputs
        return out


@pytest.mark.parametrize("triplet", ["NNG", "NIG", "IIG"])
def test_after_the_first_step_no_gradients_are_allocated(triplet: str) -> None:
    if not stores.CAN_SWAP:
        pytest.skip("this PyTorch has no UntypedStorage._swap_data_ptr_")
    sharding, _ = opened(triplet, torch.bfloat16)
    buckets = [GradStore(sharding, 128, torch.float32, "cpu") for _ in range(6)]
    counts = []
    for _ in range(3):
        with Allocations() as seen:
            for microbatch in range(2):
                for store in buckets:
                    store.prepare()
                    store.full.flat += 1.0
                    if store.level:
                        store.reduce("a bucket")
                    if microbatch:
                        store.finish("a bucket")
            for store in buckets:
                store.wait_for_finish()
                store.wait_for_reduce()
                assert store.owned.eq(2.0).all()
                store.zero()
        counts.append(seen.count)
    in_flight = 2 if triplet == "NNG" else 2 + 4 + 1  # copies of full buckets and of halves, and one full bucket
    assert counts == [in_flight, 0, 0] and sharding.buffers.allocations == in_flight


@pytest.mark.parametrize("is_swapped", [True, False])
def test_gathered_weights_use_the_memory_of_a_pool_under_their_views(
    is_swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five buckets are gathered at a time; without the swap (before PyTorch 2.13) each allocates its own."""
    monkeypatch.setattr(stores, "CAN_SWAP", is_swapped and stores.CAN_SWAP)
    sharding, _ = opened("IIG")
    buckets = [ParamStore(sharding, 128, torch.float32, "cpu") for _ in range(5)]
    views = [store.full.flat[64:96].view(4, 8) for store in buckets]
    for number, store in enumerate(buckets):
        views[number].fill_(number)
        store.copy_shard_from_full()
        store.release("nobody")
    addresses: set[int] = set()

    def use(number: int) -> None:
        buckets[number].wait()
        assert views[number].eq(number).all() and views[number].data_ptr() == buckets[number].full.flat[64:].data_ptr()
        addresses.add(buckets[number].full.flat.data_ptr())

    for _ in range(3):
        buckets[0].gather("unit")
        for number in range(5):
            if number < 4:
                buckets[number + 1].gather("unit")
            use(number)
            buckets[number].release("unit")
            assert not buckets[number].full.flat.untyped_storage().nbytes()
    pooled = 2 if stores.CAN_SWAP else 0
    assert sharding.buffers.allocations == pooled and (not pooled or len(addresses) == pooled)
    for store in buckets:
        store.gather("a checkpoint", is_pooled=False)
    for number in range(5):
        use(number)
        buckets[number].release("a checkpoint")
    assert sharding.buffers.allocations == pooled, "the pool keeps nothing of an unsharded model"


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_micro_batches_are_scaled_as_they_are_added(wire: torch.dtype | None) -> None:
    sharding, _ = opened("NIG", wire)
    store = GradStore(sharding, 128, torch.float32, "cpu")
    store.release_full()
    for value in (1.0, 2.0):
        store.prepare()
        store.full.flat += value
        store.reduce("a bucket", 0.25)
    store.finish("a bucket").wait()
    assert store.owned.eq(0.75).all()


def test_two_copies_for_the_wire_live_at_most_and_what_is_owned_comes_back() -> None:
    sharding, lanes = opened("NNG", torch.bfloat16)
    buckets = [GradStore(sharding, 128, torch.float32, "cpu") for _ in range(5)]
    for number, store in enumerate(buckets):
        store.shard.fill_(number)
        store.finish(f"bucket {number}")
        lanes.jobs[-1].start()
        lanes.jobs[-1].region.group_slice.fill_(10 + number)  # the sum over ranks
        assert sum(job.after is not None for job in lanes.jobs) <= 2
    for job in lanes.jobs:
        job.wait()
    for number, store in enumerate(buckets):
        assert store.owned.numel() == 32 and store.owned.eq(10 + number).all()
        assert store.shard.sum() == 32 * (10 + number) + 96 * number  # the rest is nobody's to read


def test_memory_is_asked_for_and_given_back_in_the_main_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    made: list[FullBucket] = []

    @contextmanager
    def allocate_on_default_stream(device: torch.device) -> Iterator[None]:
        yield
        sizes.append(made[0].flat.untyped_storage().nbytes() if made else -1)

    monkeypatch.setattr(stores, "allocate_on_default_stream", allocate_on_default_stream)
    made.append(FullBucket(8, torch.float32, "cpu"))
    made[0].allocate()
    assert sizes == [-1], "it is there"
    made[0].release()
    made[0].allocate()
    assert sizes == [-1, 0, 32]


@pytest.mark.parametrize("triplet", ["NNN", "NIG", "GGG"])
def test_a_bucket_resolves_its_collectives_once(triplet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sharding, lanes = opened(triplet)
    sizes: list[int] = []
    resolve = ShardingState.bucket_collectives
    monkeypatch.setattr(
        ShardingState, "bucket_collectives", lambda self, size: (sizes.append(size), resolve(self, size))[1]
    )
    grads, params = GradStore(sharding, 128, torch.float32, "cpu"), ParamStore(sharding, 128, torch.bfloat16, "cpu")
    assert sizes == [128 * 4, 128 * 2]
    for _ in range(3):
        if sharding.strategy.grads:
            grads.prepare()
            grads.reduce("a bucket")
        grads.finish("a bucket").wait()
        grads.zero()
        params.sync("a bucket")
        params.finish_sync()
        params.release("nobody")
        params.gather("a unit")
        params.wait()
    assert len(lanes.jobs) >= 3 and len(sizes) == 2
