"""Planted errors of sharded parameters, gradients and optimizer states; see `mutants.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tests.regression.planted import Planted, wrapped


@contextmanager
def dropped_inter_group_sync() -> Iterator[Planted]:
    """Leave out the collectives between groups that end a step, so that each group trains on its own samples."""
    from megatron.longseq.sharding.plan.collectives import Scope
    from megatron.longseq.sharding.runtime.state import ShardingState

    planted = Planted()

    def bucket_collectives(original: Any, self: Any, size: int) -> Any:
        found = original(self, size)
        inside = tuple(collective for collective in found.finish_grads if collective.scope is Scope.INSIDE)
        planted.times += inside != found.finish_grads
        return found._replace(finish_grads=inside)

    with wrapped(ShardingState, "bucket_collectives", bucket_collectives):
        yield planted


@contextmanager
def double_counted_norm() -> Iterator[Planted]:
    """Sum the norm over all ranks, although each group holds a complete copy."""
    import torch.distributed as dist

    planted = Planted()

    def everyone(groups: Any) -> Any:
        planted.times += groups.statistics.size() < dist.get_world_size()
        return groups._replace(statistics=dist.group.WORLD)

    with _optimizer_groups(everyone):
        yield planted


@contextmanager
def norm_of_own_shard() -> Iterator[Planted]:
    """Compute the norm of this rank's shard only."""
    planted = Planted()

    def alone(groups: Any) -> Any:
        planted.times += groups.statistics.size() > groups.replicas.size()
        return groups._replace(statistics=groups.replicas)

    with _optimizer_groups(alone):
        yield planted


@contextmanager
def wrong_shard() -> Iterator[Planted]:
    """Update the shard of the rank instead of the logical rank."""
    from megatron.longseq.sharding.runtime import process_groups as optimizergroups

    planted = Planted()

    def copies_of(original: Any, members: Any, *rest: Any) -> Any:
        copies = original(members, *rest)
        planted.times += copies != [tuple(members)]
        return [tuple(members)] if len(copies) == 1 else copies

    with wrapped(optimizergroups, "copies_of", copies_of):
        yield planted


@contextmanager
def stale_part() -> Iterator[Planted]:
    """In the third step, gather the parameters that a rank had before the new ones of other ranks arrived."""
    from megatron.longseq.sharding.runtime.bucket_storage import ParamStore

    planted = Planted()
    steps: dict[int, int] = {}
    before: dict[int, Tensor] = {}

    def sync(original: Any, self: Any, label: str) -> None:
        steps[id(self)] = steps.get(id(self), 0) + 1
        before[id(self)] = self.shard.clone()
        original(self, label)

    def gather(original: Any, self: Any, user: str, **named: Any) -> None:
        part = self.shard
        if steps.get(id(self)) == 2:
            planted.times += 1
            self.shard = before[id(self)]
        original(self, user, **named)
        self.shard = part

    with wrapped(ParamStore, "sync", sync), wrapped(ParamStore, "gather", gather):
        yield planted


@contextmanager
def old_contents() -> Iterator[Planted]:
    """In the first forward pass of the third step, skip an all-gather and keep the old contents of the bucket."""
    from megatron.longseq.sharding.runtime.bucket_storage import ParamStore
    from megatron.longseq.sharding.runtime.unit_hooks import GatherHooks

    planted = Planted()
    is_shown: list[bool] = []
    steps: dict[int, int] = {}
    old: dict[int, Tensor] = {}

    def sync(original: Any, self: Any, label: str) -> None:
        steps[id(self)] = steps.get(id(self), 0) + 1
        original(self, label)

    def release(original: Any, self: Any, user: str) -> None:
        if self.full.is_allocated and self._gathering is None and steps.get(id(self), 0) < 2:
            old[id(self)] = self.full.flat.clone()
        original(self, user)

    def gather(original: Any, self: Any, user: str, **named: Any) -> None:
        if self.full.is_allocated or steps.get(id(self)) != 2 or is_shown:
            original(self, user, **named)
            return
        planted.times += 1
        steps[id(self)] += 1
        self._users.add(user)
        self.full.allocate()
        self.full.flat.copy_(old[id(self)])

    def gather_all(original: Any, self: Any) -> None:
        is_shown.append(True)  # for a checkpoint; training gathers again
        original(self)
        is_shown.pop()

    with (
        wrapped(GatherHooks, "gather_all", gather_all),
        wrapped(ParamStore, "sync", sync),
        wrapped(ParamStore, "release", release),
        wrapped(ParamStore, "gather", gather),
    ):
        yield planted


@contextmanager
def kept_over_a_step() -> Iterator[Planted]:
    """Keep the first units gathered from a step's last backward to the next step's forward: their values are old."""
    from megatron.longseq.sharding.plan.gather_window import Direction
    from megatron.longseq.sharding.runtime.selective_hooks import SelectiveGatherHooks
    from megatron.longseq.sharding.runtime.unit_hooks import GatherHooks

    planted = Planted()

    def following(original: Any, self: Any, unit: Any, direction: Direction) -> Any:
        found = original(self, unit, direction)
        return Direction.FORWARD if found is None and unit.module.training else found

    def release_all(original: Any, self: Any) -> None:
        if self._is_all_gathered:
            original(self)
            return
        planted.times += sum(store.full.is_allocated for unit in self.units for store in unit.stores)

    with (
        wrapped(SelectiveGatherHooks, "_following", following),
        wrapped(GatherHooks, "release_all", release_all),
    ):
        yield planted


@contextmanager
def lost_reduction() -> Iterator[Planted]:
    """Skip the reduction of one bucket in one micro-batch."""
    from megatron.longseq.sharding.runtime.bucket_storage import GradStore

    planted, calls = Planted(), 0

    def reduce(original: Any, self: Any, label: str, factor: float) -> None:
        nonlocal calls
        calls += 1
        if calls != 12:
            original(self, label, factor)
            return
        planted.times += 1
        self.full.release()

    with wrapped(GradStore, "reduce", reduce):
        yield planted


@contextmanager
def scaled_twice() -> Iterator[Planted]:
    """Divide gradients by the number of ranks twice. Adam is invariant to the scale."""
    from megatron.longseq.sharding.runtime.bucket_group import ShardedBucketGroup
    from megatron.longseq.sharding.runtime.bucket_storage import GradStore

    planted = Planted()

    def scale(original: Any, self: Any) -> None:
        planted.times += self.bucket.gradient_scaling_factor != 1.0
        original(self)
        original(self)

    def reduce(original: Any, self: Any, label: str, factor: float) -> None:
        planted.times += factor != 1.0
        original(self, label, factor * factor)

    with wrapped(ShardedBucketGroup, "_scale", scale), wrapped(GradStore, "reduce", reduce):
        yield planted


@contextmanager
def _optimizer_groups(change: Any) -> Iterator[None]:
    from megatron.longseq.sharding.runtime import process_groups as optimizergroups

    def opened(original: Any, *args: Any, **named: Any) -> Any:
        return change(original(*args, **named))

    with wrapped(optimizergroups, "open_optimizer_groups", opened):
        yield


ALL = (
    dropped_inter_group_sync,
    double_counted_norm,
    norm_of_own_shard,
    wrong_shard,
    stale_part,
    old_contents,
    kept_over_a_step,
    lost_reduction,
    scaled_twice,
)
