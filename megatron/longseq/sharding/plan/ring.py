"""The hierarchical overlapping ring as data: which phase of which bucket runs when, and every message of it, in place.

A collective over all ranks is one flat ring, or phases inside groups and between them (`phases`). Of one bucket they
follow each other; of different buckets one can run inside groups while another runs between them, on other links. A
*slot* holds what runs at one time: one phase on each link at most, never two of one bucket.

Messages are runs of shards of a bucket that is cut by logical rank (`groups`): each is contiguous, and lies where it
belongs when it arrives.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from megatron.longseq.sharding.plan.collectives import Kind, Phase, Phases, Scope, finish, flat, gather, needed, scatter
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.strategy import Level


class Mode(StrEnum):
    """How collectives over all ranks run (--paro-collectives)."""

    FLAT = "flat"
    HIERARCHICAL = "hierarchical"
    OVERLAPPED = "overlapped"


_WHOLE: dict[Kind, Phases] = {
    Kind.ALL_GATHER: gather(Level.GLOBAL),
    Kind.REDUCE_SCATTER: scatter(Level.GLOBAL),
    Kind.ALL_REDUCE: finish(Level.NONE, Level.NONE),
}


class Run(NamedTuple):
    """A phase of a bucket.

    Attributes:
        slot: when.
        bucket: of which bucket.
        turn: which of the bucket's phases.
        phase: the collective.
    """

    slot: int
    bucket: int
    turn: int
    phase: Phase


class Piece(NamedTuple):
    """Shards [begin, end) of a bucket to or from a peer; `adds`: the receiver adds them to its own."""

    peer: int
    begin: int
    end: int
    adds: bool


class Step(NamedTuple):
    """What a member does at once in a ring: it sends one piece and receives one.

    Attributes:
        run: in which phase.
        number: which of its steps.
        send, receive: to the next member of its ring, from the one before.
    """

    run: Run
    number: int
    send: Piece
    receive: Piece


@dataclass(frozen=True, slots=True)
class Plan:
    """A collective over all ranks, of some buckets.

    Attributes:
        groups: the ranks.
        kind: what it does to every bucket: a member gives or gets the shard of its logical rank.
        mode: how.
        buckets: how many, in order.
        runs: by slot; alike on all members, and so is the order on every link.
        steps: of every member, by slot and number; two of one slot run at the same time.
    """

    groups: Groups
    kind: Kind
    mode: Mode
    buckets: int
    runs: tuple[Run, ...]
    steps: tuple[tuple[Step, ...], ...]


def whole(kind: Kind, groups: Groups, mode: Mode) -> Phases:
    """Return the phases of a collective over all ranks."""
    return needed(flat(_WHOLE[kind]) if mode is Mode.FLAT else _WHOLE[kind], groups)


def plan_ring(groups: Groups, kind: Kind, mode: Mode, buckets: int = 1) -> Plan:
    """Return the plan of a collective over all ranks.

    Raises:
        ValueError: no bucket.
    """
    if buckets < 1:
        raise ValueError(f"{kind} of {buckets} buckets: give at least 1")
    runs = schedule(whole(kind, groups, mode), buckets, is_overlapped=mode is Mode.OVERLAPPED)
    steps = tuple(
        tuple(step for run in runs for step in ring_steps(groups, run, member)) for member in range(groups.ranks)
    )
    return Plan(groups, kind, mode, buckets, runs, steps)


def schedule(phases: Phases, buckets: int, *, is_overlapped: bool) -> tuple[Run, ...]:
    """Return when each phase of each bucket runs.

    One after another; or overlapped, in every slot on each link the earliest phase that can run, of the first bucket:
    so no link waits while a later bucket could use it.

    Args:
        phases: of every bucket.
        buckets: how many.
        is_overlapped: phases on different links share a slot.
    """
    if not is_overlapped:
        order = [(bucket, index, phase) for bucket in range(buckets) for index, phase in enumerate(phases)]
        return tuple(Run(slot, *rest) for slot, rest in enumerate(order))
    done = [0] * buckets
    runs: list[Run] = []
    while min(done) < len(phases):
        slot = runs[-1].slot + 1 if runs else 0
        chosen: dict[Scope, Run] = {}
        for index, bucket in sorted((index, bucket) for bucket, index in enumerate(done) if index < len(phases)):
            chosen.setdefault(phases[index].scope, Run(slot, bucket, index, phases[index]))
        for run in chosen.values():
            done[run.bucket] += 1
        runs += chosen.values()
    return tuple(runs)


def ring_steps(groups: Groups, run: Run, member: int) -> tuple[Step, ...]:
    """Return what a member does in a phase: nothing is sent twice, nothing is moved again.

    In a scatter, the piece that ends at a member starts at the one behind it and gathers sums on its way round; in a
    gather, a member's own piece goes round the other members. An all-reduce is a scatter and a gather.
    """
    ring = _ring(groups, run.phase.scope, member)
    place, size = ring.index(member), len(ring)
    adding = 0 if run.phase.kind is Kind.ALL_GATHER else size - 1
    steps = []
    for number in range(run.phase.steps(groups)):
        adds = number < adding
        back = number + 1 if adds else number - adding
        sent, received = ring[(place - back) % size], ring[(place - back - 1) % size]
        steps.append(
            Step(
                run,
                number,
                Piece(ring[(place + 1) % size], *_piece(groups, run.phase.scope, sent), adds),
                Piece(ring[(place - 1) % size], *_piece(groups, run.phase.scope, received), adds),
            )
        )
    return tuple(steps)


def _ring(groups: Groups, scope: Scope, member: int) -> tuple[int, ...]:
    """Return the members of a member's ring: neighbours next to each other, so that a flat one leaves a group once."""
    group, number = divmod(member, groups.size)
    if scope is Scope.FLAT:
        return tuple(range(groups.ranks))
    if scope is Scope.INSIDE:
        return tuple(range(group * groups.size, (group + 1) * groups.size))
    return tuple(range(number, groups.ranks, groups.size))


def _piece(groups: Groups, scope: Scope, member: int) -> tuple[int, int]:
    """Return the shards that a member ends a scatter with, and begins a gather with, in a scope."""
    owned = groups.owned(Level.GROUP if scope is Scope.INSIDE else Level.GLOBAL, member)
    return owned.start, owned.stop
