"""Compute what sharded runs send, bucket by bucket. Tests compare the runs' counters with this formula."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.longseq.sharding.plan.collectives import BucketCollectives, FlatChooser, bucket_collectives, never_flat
from megatron.longseq.sharding.plan.comm_volume import CommVolume, volume
from megatron.longseq.sharding.plan.memory import Widths
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of a model-parallel rank.

    Attributes:
        numel: elements, padded to n equal shards.
        gathers: how often a micro-batch gathers its parameters, if they are sharded: twice, before forward and before
            backward; once for an embedding; three times for a weight that the output layer shares with it.
        is_trained: whether it has gradients.
    """

    numel: int
    gathers: int = 2
    is_trained: bool = True


def bucket_volume(
    strategy: Strategy,
    groups: RankGroups,
    buckets: Sequence[Bucket],
    widths: Widths,
    microbatches: int,
    *,
    passes: int = 1,
    is_flat: FlatChooser = never_flat,
    gathers: Sequence[int] | None = None,
) -> CommVolume:
    """Return what a rank sends in a step, counted bucket by bucket as the runtime sends it.

    Args:
        strategy: the triplet.
        groups: the data-parallel ranks.
        buckets: all buckets of the rank.
        widths: bytes of an element.
        microbatches: of a step, A.
        passes: forward passes that make up a micro-batch (its segments).
        is_flat: chooses flat collectives, by bucket size.
        gathers: of every bucket's parameters in the step; None: those of every micro-batch, without selective overlap.
    """
    gathers = gathers or [bucket.gathers * passes * microbatches for bucket in buckets]

    def terms(bucket: Bucket, width: int) -> BucketCollectives:
        return bucket_collectives(strategy, groups, bucket.numel * width, is_flat)

    total = CommVolume()
    for bucket, times in zip(buckets, gathers, strict=True):
        shard = bucket.numel // groups.ranks
        params, grads = terms(bucket, widths.param), terms(bucket, widths.grad_wire)
        total += volume(params.params, groups, shard * widths.param) * times
        if bucket.is_trained:
            total += volume(grads.grads, groups, shard * widths.grad_wire) * microbatches
            total += volume(grads.finish_grads, groups, shard * widths.grad_wire)
            total += volume(params.finish_params, groups, shard * widths.param)
    return total


def describe_buckets(chunk: Any) -> list[Bucket]:
    """Return the buckets of a sharded model chunk, once a first step has shown what is gathered."""
    units = [] if chunk.gather_hooks is None else chunk.gather_hooks.units
    trained = {id(group.store): group.store for group in chunk.bucket_groups}
    stores = trained | {id(store): store for unit in units for store in unit.stores}
    gathers = dict.fromkeys(stores, 0)
    for unit in units:
        for store in unit.stores:
            gathers[id(store)] += 1 + unit.is_reached
    return [Bucket(store.numel, gathers[key], key in trained) for key, store in stores.items()]
