"""The collectives of each strategy, as data: the runtime runs them, `comm_volume` counts them, `time_model` times them.

A model state is stored at one sharding level and needed at another. Hierarchically, the change of level takes a
collective inside groups and one between groups; flat, it takes a single collective over all data-parallel ranks.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Level, Strategy


class CollectivesMode(StrEnum):
    """How a collective over all data-parallel ranks runs (--paro-collectives)."""

    FLAT = "flat"
    HIERARCHICAL = "hierarchical"
    OVERLAPPED = "overlapped"


class CollectiveKind(StrEnum):
    """What a collective does."""

    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"


class Scope(StrEnum):
    """Which ranks take part: those of a group, those of one number in all groups, or all."""

    INSIDE = "inside"
    BETWEEN = "between"
    FLAT = "flat"


class Collective(NamedTuple):
    """One in-place collective on a bucket: on the whole bucket inside groups and flat, on a slice between groups."""

    kind: CollectiveKind
    scope: Scope

    def ranks(self, groups: RankGroups) -> int:
        """Return the number of ranks that take part."""
        return {Scope.INSIDE: groups.size, Scope.BETWEEN: groups.count, Scope.FLAT: groups.ranks}[self.scope]

    def shards_per_message(self, groups: RankGroups) -> int:
        """Return how many of a bucket's n shards one ring message carries."""
        return groups.count if self.scope is Scope.INSIDE else 1

    def steps(self, groups: RankGroups) -> int:
        """Return the number of messages that a rank sends in a ring."""
        return (self.ranks(groups) - 1) * (2 if self.kind is CollectiveKind.ALL_REDUCE else 1)

    def shards_sent(self, groups: RankGroups) -> int:
        """Return how many of a bucket's n shards a rank sends."""
        return self.steps(groups) * self.shards_per_message(groups)


Collectives = tuple[Collective, ...]
# Whether to run these collectives, which equal one flat collective, as that one; arguments: the flat one, bucket bytes.
FlatChooser = Callable[[Collectives, int], bool]

GATHER_INSIDE = Collective(CollectiveKind.ALL_GATHER, Scope.INSIDE)
GATHER_BETWEEN = Collective(CollectiveKind.ALL_GATHER, Scope.BETWEEN)
SCATTER_INSIDE = Collective(CollectiveKind.REDUCE_SCATTER, Scope.INSIDE)
SCATTER_BETWEEN = Collective(CollectiveKind.REDUCE_SCATTER, Scope.BETWEEN)
REDUCE_BETWEEN = Collective(CollectiveKind.ALL_REDUCE, Scope.BETWEEN)

_HIERARCHICAL: dict[CollectiveKind, Collectives] = {
    CollectiveKind.ALL_GATHER: (GATHER_BETWEEN, GATHER_INSIDE),
    CollectiveKind.REDUCE_SCATTER: (SCATTER_INSIDE, SCATTER_BETWEEN),
    CollectiveKind.ALL_REDUCE: (SCATTER_INSIDE, REDUCE_BETWEEN, GATHER_INSIDE),
}
_FLAT = {collectives: kind for kind, collectives in _HIERARCHICAL.items()}


def gather(source: Level, target: Level = Level.NONE) -> Collectives:
    """Return the all-gathers from shards at one level to shards at a coarser one; none if `target` is not coarser.

    Args:
        source: level at which the state is stored.
        target: level at which it is needed.
    """
    between = (GATHER_BETWEEN,) if source is Level.GLOBAL and target < source else ()
    inside = (GATHER_INSIDE,) if source > target and target is Level.NONE else ()
    return between + inside


def scatter(target: Level) -> Collectives:
    """Return the reduce-scatters from full gradients to shards: inside groups for level I, then between for G."""
    return _HIERARCHICAL[CollectiveKind.REDUCE_SCATTER][: int(target)]


def finish(source: Level, target: Level) -> Collectives:
    """Return the collectives from the sums of `scatter` at one level to the sums of all ranks at another level.

    Args:
        source: level at which `scatter` has summed gradients.
        target: level at which the optimizer reads them.
    """
    collectives: Collectives = (SCATTER_INSIDE,) if source is Level.NONE else ()
    if source is not Level.GLOBAL:
        collectives += (SCATTER_BETWEEN,) if target is Level.GLOBAL else (REDUCE_BETWEEN,)
    elif target is not Level.GLOBAL:
        collectives += (GATHER_BETWEEN,)
    return collectives + ((GATHER_INSIDE,) if target is Level.NONE else ())


def flat(collectives: Collectives) -> Collectives:
    """Return the one collective over all ranks that does the same, where there is one; else the argument."""
    return (Collective(_FLAT[collectives], Scope.FLAT),) if collectives in _FLAT else collectives


def nontrivial(collectives: Collectives, groups: RankGroups) -> Collectives:
    """Return the collectives in which more than one rank takes part."""
    return tuple(collective for collective in collectives if collective.ranks(groups) > 1)


def full_collective(kind: CollectiveKind, groups: RankGroups, mode: CollectivesMode) -> Collectives:
    """Return the collectives that make up one collective over all ranks.

    Args:
        kind: all-gather, reduce-scatter or all-reduce.
        groups: the data-parallel ranks.
        mode: flat: one collective; otherwise those inside and between groups.
    """
    collectives = _HIERARCHICAL[kind]
    return nontrivial(flat(collectives) if mode is CollectivesMode.FLAT else collectives, groups)


class BucketCollectives(NamedTuple):
    """The collectives of one bucket in a training step (PaRO, arXiv 2310.06003, section 3).

    Attributes:
        params: all-gather parameters, before every unit's forward and again before its backward.
        grads: reduce gradients, after every micro-batch's backward.
        finish_grads: reduce gradients further, after the last micro-batch's backward.
        finish_params: all-gather trained parameters, after the optimizer's step.
    """

    params: Collectives
    grads: Collectives
    finish_grads: Collectives
    finish_params: Collectives


def never_flat(collectives: Collectives, size: int) -> bool:
    """Run every collective hierarchically; a `FlatChooser`."""
    return False


def always_flat(collectives: Collectives, size: int) -> bool:
    """Run a flat collective wherever there is one (--paro-collectives flat); a `FlatChooser`."""
    return True


def bucket_collectives(
    strategy: Strategy, groups: RankGroups, size: int = 0, is_flat: FlatChooser = never_flat
) -> BucketCollectives:
    """Return the collectives of a bucket under a strategy.

    Args:
        strategy: the triplet, valid or not.
        groups: the data-parallel ranks.
        size: bytes of the bucket, which `is_flat` may depend on.
        is_flat: chooses between the flat collective and the hierarchical ones.
    """

    def resolve(collectives: Collectives) -> Collectives:
        hierarchical = nontrivial(collectives, groups)
        together = nontrivial(flat(collectives), groups)
        return together if together != hierarchical and is_flat(together, size) else hierarchical

    return BucketCollectives(
        params=resolve(gather(strategy.params)),
        grads=resolve(scatter(strategy.grads)),
        finish_grads=resolve(finish(strategy.grads, strategy.optimizer)),
        finish_params=resolve(gather(strategy.optimizer, strategy.params)),
    )
