"""Which collectives a strategy takes, as data: what the runtime runs, what traffic counts, what the clock times.

A state is held at one level and wanted at another. Between groups, ranks of one number exchange their slices; inside a
group, all its ranks theirs. Flat, both become one collective over all ranks, where both are there.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.strategy import Level, Strategy


class Kind(StrEnum):
    """What a collective does."""

    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"


class Scope(StrEnum):
    """Which ranks take part: those of a group, those of one number in all groups, or all."""

    INSIDE = "inside"
    BETWEEN = "between"
    FLAT = "flat"


class Phase(NamedTuple):
    """One collective on one bucket, in place: inside a group and flat on all of it, between groups on a slice."""

    kind: Kind
    scope: Scope

    def ranks(self, groups: Groups) -> int:
        """Return how many ranks take part."""
        return {Scope.INSIDE: groups.size, Scope.BETWEEN: groups.count, Scope.FLAT: groups.ranks}[self.scope]

    def piece(self, groups: Groups) -> int:
        """Return how many of a bucket's n shards one message of a ring has."""
        return groups.count if self.scope is Scope.INSIDE else 1

    def steps(self, groups: Groups) -> int:
        """Return how many messages a rank sends in a ring."""
        return (self.ranks(groups) - 1) * (2 if self.kind is Kind.ALL_REDUCE else 1)

    def shards_sent(self, groups: Groups) -> int:
        """Return how many of a bucket's n shards a rank sends."""
        return self.steps(groups) * self.piece(groups)


Phases = tuple[Phase, ...]
Decide = Callable[[Phases, int], bool]  # whether phases that are one flat collective run as that; of a bucket's bytes

GATHER_INSIDE = Phase(Kind.ALL_GATHER, Scope.INSIDE)
GATHER_BETWEEN = Phase(Kind.ALL_GATHER, Scope.BETWEEN)
SCATTER_INSIDE = Phase(Kind.REDUCE_SCATTER, Scope.INSIDE)
SCATTER_BETWEEN = Phase(Kind.REDUCE_SCATTER, Scope.BETWEEN)
REDUCE_BETWEEN = Phase(Kind.ALL_REDUCE, Scope.BETWEEN)

_FLAT: dict[Phases, Kind] = {
    (GATHER_BETWEEN, GATHER_INSIDE): Kind.ALL_GATHER,
    (SCATTER_INSIDE, SCATTER_BETWEEN): Kind.REDUCE_SCATTER,
    (SCATTER_INSIDE, REDUCE_BETWEEN, GATHER_INSIDE): Kind.ALL_REDUCE,
}


def gather(held: Level, wanted: Level = Level.NONE) -> Phases:
    """Return what makes of shards at one level those of a coarser one; nothing, where that is not coarser."""
    between = (GATHER_BETWEEN,) if held is Level.GLOBAL and wanted < held else ()
    inside = (GATHER_INSIDE,) if held > wanted and wanted is Level.NONE else ()
    return between + inside


def scatter(wanted: Level) -> Phases:
    """Return what reduces whole gradients of every rank to shards: at level I inside a group, at level G fully."""
    return (SCATTER_INSIDE, SCATTER_BETWEEN)[: int(wanted)]


def finish(held: Level, wanted: Level) -> Phases:
    """Return what makes of `scatter`'s sums at one level the sums of all ranks at another, finer or not."""
    phases: Phases = (SCATTER_INSIDE,) if held is Level.NONE else ()
    if held is not Level.GLOBAL:
        phases += (SCATTER_BETWEEN,) if wanted is Level.GLOBAL else (REDUCE_BETWEEN,)
    elif wanted is not Level.GLOBAL:
        phases += (GATHER_BETWEEN,)
    return phases + ((GATHER_INSIDE,) if wanted is Level.NONE else ())


def flat(phases: Phases) -> Phases:
    """Return one collective over all ranks for phases that together are one; else the phases."""
    return (Phase(_FLAT[phases], Scope.FLAT),) if phases in _FLAT else phases


def needed(phases: Phases, groups: Groups) -> Phases:
    """Return the phases in which more than one rank takes part."""
    return tuple(phase for phase in phases if phase.ranks(groups) > 1)


class Program(NamedTuple):
    """What a strategy sends for one bucket, and when.

    Attributes:
        params: parameters, in every micro-batch, before forward and again before backward.
        grads: gradients, after every micro-batch's backward.
        finish_grads: gradients, after the last micro-batch's.
        finish_params: parameters that were trained, after the optimizer's step.
    """

    params: Phases
    grads: Phases
    finish_grads: Phases
    finish_params: Phases


def program(strategy: Strategy, groups: Groups, *, is_flat: bool = False) -> Program:
    """Return what a strategy, valid or not, sends.

    Args:
        strategy: the triplet.
        groups: the ranks.
        is_flat: one collective over all ranks where one can do it (--paro-collectives flat).
    """
    terms = (
        gather(strategy.params),
        scatter(strategy.grads),
        finish(strategy.grads, strategy.optimizer),
        gather(strategy.optimizer, strategy.params),
    )
    return Program(*(needed(flat(term) if is_flat else term, groups) for term in terms))


def chosen(strategy: Strategy, groups: Groups, term: str, size: int, is_flat: Decide) -> Phases:
    """Return the phases that a bucket takes.

    Args:
        strategy: the triplet.
        groups: the ranks.
        term: of `Program`.
        size: the bucket's bytes.
        is_flat: see `Decide`; it is given the flat collective.
    """
    apart: Phases = getattr(program(strategy, groups), term)
    together: Phases = getattr(program(strategy, groups, is_flat=True), term)
    return together if together != apart and is_flat(together, size) else apart
