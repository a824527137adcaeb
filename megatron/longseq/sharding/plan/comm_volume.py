"""Exact bytes that a rank sends under a strategy: inside groups, between groups and over all ranks; and collectives.

Bytes are those of rings: n - 1 of n shards for an all-gather or a reduce-scatter, twice that for an all-reduce.
"""

from dataclasses import dataclass

from megatron.longseq.sharding.plan.collectives import (
    Collectives,
    Scope,
    always_flat,
    bucket_collectives,
    never_flat,
)
from megatron.longseq.sharding.plan.gather_window import gather_count
from megatron.longseq.sharding.plan.memory import MEGATRON, Model, Widths
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Strategy


@dataclass(frozen=True, slots=True)
class CommVolume:
    """What a rank sends.

    Attributes:
        inside: bytes to ranks of its own group.
        between: bytes to ranks of its number in other groups.
        flat: bytes in collectives over all ranks.
        collectives: number of collectives.
    """

    inside: int = 0
    between: int = 0
    flat: int = 0
    collectives: int = 0

    def __add__(self, other: "CommVolume") -> "CommVolume":
        return CommVolume(
            self.inside + other.inside,
            self.between + other.between,
            self.flat + other.flat,
            self.collectives + other.collectives,
        )

    def __mul__(self, times: int) -> "CommVolume":
        return CommVolume(self.inside * times, self.between * times, self.flat * times, self.collectives * times)


def volume(collectives: Collectives, groups: RankGroups, shard: int, buckets: int = 1) -> CommVolume:
    """Return what a rank sends in collectives.

    Args:
        collectives: run one after another on every bucket.
        groups: the data-parallel ranks.
        shard: bytes of one of the n shards of all buckets together.
        buckets: number of buckets.
    """
    sent = dict.fromkeys(Scope, 0)
    for collective in collectives:
        sent[collective.scope] += collective.shards_sent(groups) * shard
    return CommVolume(sent[Scope.INSIDE], sent[Scope.BETWEEN], sent[Scope.FLAT], len(collectives) * buckets)


@dataclass(frozen=True, slots=True)
class StepVolume:
    """What a rank sends in a step, by term.

    Attributes:
        params: all-gathers of all buckets, once. They run before the forward of each micro-batch and again before its
            backward, except for buckets that selective overlap keeps between passes.
        grads: after the backward of each micro-batch.
        finish_grads: after the backward of the last micro-batch.
        finish_params: after the optimizer's step.
        buckets, prefetch_units: see `comm_volume`.
    """

    params: CommVolume
    grads: CommVolume
    finish_grads: CommVolume
    finish_params: CommVolume
    buckets: int = 1
    prefetch_units: int = 0

    def gathers(self, microbatches: int) -> CommVolume:
        """Return what a step of A micro-batches, one after the other, sends in all-gathers of parameters."""
        count = gather_count(self.buckets, self.prefetch_units, 2 * microbatches, 2 * microbatches - 1)
        all_of_them = self.params * count
        return CommVolume(
            all_of_them.inside // self.buckets,
            all_of_them.between // self.buckets,
            all_of_them.flat // self.buckets,
            all_of_them.collectives // self.buckets,
        )

    @property
    def microbatch(self) -> CommVolume:
        """What each micro-batch sends after the first one."""
        return self.gathers(2) + self.gathers(1) * -1 + self.grads

    @property
    def finish(self) -> CommVolume:
        """What is sent once in a step."""
        return self.finish_grads + self.finish_params

    def step(self, microbatches: int) -> CommVolume:
        """Return what a step of A micro-batches sends."""
        return self.gathers(microbatches) + self.grads * microbatches + self.finish


def comm_volume(
    strategy: Strategy,
    groups: RankGroups,
    model: Model,
    widths: Widths = MEGATRON,
    *,
    buckets: int = 1,
    is_flat: bool = False,
    prefetch_units: int = 0,
) -> StepVolume:
    """Return what a rank sends under a strategy.

    Args:
        strategy, groups, widths: see `memory`.
        model: its parameters. Frozen parameters are gathered like others, but neither reduced nor sent after a step.
        buckets: number of buckets of parameters, and of gradients.
        is_flat: whether flat collectives run where there are any (--paro-collectives flat).
        prefetch_units: --paro-prefetch-units, with every bucket of parameters as a unit; 0: without
            --paro-selective-overlap.
    """
    terms = bucket_collectives(strategy, groups, is_flat=always_flat if is_flat else never_flat)
    params, trained = model.shard(groups) * widths.param, model.trainable_shard(groups)
    return StepVolume(
        params=volume(terms.params, groups, params, buckets),
        grads=volume(terms.grads, groups, trained * widths.grad_wire, buckets),
        finish_grads=volume(terms.finish_grads, groups, trained * widths.grad_wire, buckets),
        finish_params=volume(terms.finish_params, groups, trained * widths.param, buckets),
        buckets=buckets,
        prefetch_units=prefetch_units,
    )
