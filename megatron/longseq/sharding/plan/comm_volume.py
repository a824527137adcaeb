"""What a strategy sends: exact bytes per rank inside groups, between them and over all ranks, and how many collectives.

Bytes are those of rings: n - 1 of n shards for a gather or a scatter, twice that for an all-reduce.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron.longseq.sharding.plan.collectives import Decide, Phases, Scope, chosen, program
from megatron.longseq.sharding.plan.memory import MEGATRON, Model, Widths
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a rank sends.

    Attributes:
        inside: bytes to ranks of its group.
        between: bytes to ranks of its number in other groups.
        flat: bytes in collectives over all ranks.
        collectives: calls.
    """

    inside: int = 0
    between: int = 0
    flat: int = 0
    collectives: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.inside + other.inside,
            self.between + other.between,
            self.flat + other.flat,
            self.collectives + other.collectives,
        )

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(self.inside * times, self.between * times, self.flat * times, self.collectives * times)

    def leaving(self, groups: Groups) -> int:
        """Return bytes that leave one group: of all its ranks between groups, of one in a flat ring."""
        return groups.size * self.between + (self.flat if groups.count > 1 else 0)


def volume(phases: Phases, groups: Groups, shard: int, buckets: int = 1) -> Traffic:
    """Return what phases send.

    Args:
        phases: run one after another on every bucket.
        groups: the ranks.
        shard: bytes of one of n shards of all buckets together.
        buckets: how many.
    """
    sent = dict.fromkeys(Scope, 0)
    for phase in phases:
        sent[phase.scope] += phase.shards_sent(groups) * shard
    return Traffic(sent[Scope.INSIDE], sent[Scope.BETWEEN], sent[Scope.FLAT], len(phases) * buckets)


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """What a rank sends in a step, term by term.

    Attributes:
        params: before forward, and again before backward, of each micro-batch.
        grads: after backward of each micro-batch.
        finish_grads: after the last one's backward.
        finish_params: after the optimizer's step.
    """

    params: Traffic
    grads: Traffic
    finish_grads: Traffic
    finish_params: Traffic

    @property
    def microbatch(self) -> Traffic:
        """Of each micro-batch."""
        return self.params * 2 + self.grads

    @property
    def finish(self) -> Traffic:
        """Once a step."""
        return self.finish_grads + self.finish_params

    def step(self, microbatches: int) -> Traffic:
        """Return the traffic of a step of A micro-batches."""
        return self.microbatch * microbatches + self.finish


def traffic(
    strategy: Strategy,
    groups: Groups,
    model: Model,
    widths: Widths = MEGATRON,
    *,
    buckets: int = 1,
    is_flat: bool = False,
) -> StepTraffic:
    """Return what a strategy sends.

    Args:
        strategy: the triplet, valid or not.
        groups: the ranks.
        model: its parameters. Frozen ones are gathered as others, but neither reduced nor sent after a step.
        widths: bytes of an element.
        buckets: of parameters, and as many of gradients.
        is_flat: --paro-collectives flat.
    """
    terms = program(strategy, groups, is_flat=is_flat)
    params, trained = model.shard(groups) * widths.param, model.trainable_shard(groups)
    return StepTraffic(
        params=volume(terms.params, groups, params, buckets),
        grads=volume(terms.grads, groups, trained * widths.grad_wire, buckets),
        finish_grads=volume(terms.finish_grads, groups, trained * widths.grad_wire, buckets),
        finish_params=volume(terms.finish_params, groups, trained * widths.param, buckets),
    )


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of a model-parallel rank.

    Attributes:
        numel: elements, padded to n shards.
        gathers: how often a pass gathers its parameters, where they are sharded: before forward and before backward;
            an embedding's before forward alone, a weight that the output layer shares with it three times.
        is_trained: whether it has gradients.
    """

    numel: int
    gathers: int = 2
    is_trained: bool = True


def bucket_traffic(
    strategy: Strategy,
    groups: Groups,
    buckets: Iterable[Bucket],
    widths: Widths,
    microbatches: int,
    *,
    passes: int = 1,
    is_flat: Decide = lambda phases, size: False,
) -> Traffic:
    """Return what a rank sends in a step, exactly: bucket by bucket, as the runtime does.

    Args:
        strategy: the triplet.
        groups: the ranks.
        buckets: all of the rank's.
        widths: bytes of an element.
        microbatches: of a step, A.
        passes: that make up a micro-batch: its segments.
        is_flat: which collectives are flat, see `phases.chosen`.
    """

    def sent(term: str, bucket: Bucket, width: int) -> Traffic:
        phases = chosen(strategy, groups, term, bucket.numel * width, is_flat)
        return volume(phases, groups, bucket.numel // groups.ranks * width)

    total = Traffic()
    for bucket in buckets:
        total += sent("params", bucket, widths.param) * (bucket.gathers * passes * microbatches)
        if bucket.is_trained:
            total += sent("grads", bucket, widths.grad_wire) * microbatches
            total += sent("finish_grads", bucket, widths.grad_wire) + sent("finish_params", bucket, widths.param)
    return total
