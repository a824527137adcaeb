"""Plans of ring collectives, and a checker: a link does one thing at a time, both sides agree, the result is right.

Each member's shards are followed as sets of contributions: whose part of the sum, or whose shard, lies where. A set of
members is the bits of an integer.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from megatron.longseq.sharding.plan.collectives import CollectiveKind, CollectivesMode, Scope, full_collective
from megatron.longseq.sharding.plan.overlap_order import ScheduledCollective, schedule
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.gloo_ring import ShardTransfer, ring_messages

Buffer = list[int]  # by shard
State = list[list[Buffer]]  # by member and bucket


class PlannedMessage(NamedTuple):
    """A step of a member in the ring of one scheduled collective; see `RingMessage`."""

    run: ScheduledCollective
    number: int
    send: ShardTransfer
    receive: ShardTransfer


@dataclass(frozen=True, slots=True)
class RingCollective:
    """A collective over all ranks, of some buckets.

    Attributes:
        groups: the ranks.
        kind: what it does to every bucket.
        mode: how.
        buckets: how many, in order.
        runs: by slot; alike on all members.
        steps: of every member, by slot and number; two of one slot run at the same time.
    """

    groups: RankGroups
    kind: CollectiveKind
    mode: CollectivesMode
    buckets: int
    runs: tuple[ScheduledCollective, ...]
    steps: tuple[tuple[PlannedMessage, ...], ...]


def plan_ring_collective(
    groups: RankGroups, kind: CollectiveKind, mode: CollectivesMode, buckets: int = 1
) -> RingCollective:
    """Return every message of a collective over all ranks."""
    collectives = full_collective(kind, groups, mode)
    runs = schedule(collectives, buckets, is_overlapped=mode is CollectivesMode.OVERLAPPED)
    steps = tuple(
        tuple(
            PlannedMessage(run, *message) for run in runs for message in ring_messages(groups, run.collective, member)
        )
        for member in range(groups.ranks)
    )
    return RingCollective(groups, kind, mode, buckets, runs, steps)


class PlanError(ValueError):
    """A plan that is not the collective that it says; the message names the member, the slot and the bucket."""


class RingProof(NamedTuple):
    """What was proven of a plan.

    Attributes:
        plan: the plan.
        result: what every member may use at the end: by member, bucket and shard, whose contributions.
        slots: how many.
        shared: in how many of them two links are busy.
        sent: shards that every member sends on each link, of all buckets.
    """

    plan: RingCollective
    result: dict[tuple[int, int, int], frozenset[int]]
    slots: int
    shared: int
    sent: dict[Scope, int]


def prove(plan: RingCollective) -> RingProof:
    """Check a plan and return what it does.

    Raises:
        PlanError: it is wrong; the message says where.
    """
    _check_runs(plan)
    _check_links(plan)
    _check_channels(plan)
    state = execute(plan)
    result = _result(plan, state)
    _check_result(plan, result)
    links = Counter(run.slot for run in plan.runs)
    return RingProof(plan, result, len(links), sum(count > 1 for count in links.values()), _sent(plan))


def _check_runs(plan: RingCollective) -> None:
    """Require each bucket's phases in order, in different slots, one on a link in a slot, alike on all members."""
    reached = [0] * plan.buckets
    free_from = [0] * plan.buckets
    busy: dict[tuple[int, Scope], int] = {}
    last = 0
    for run in plan.runs:
        where = f"slot {run.slot}, bucket {run.bucket}, {run.collective.kind} {run.collective.scope}"
        if run.slot < last:
            raise PlanError(f"{where}: listed after slot {last}")
        if run.turn != reached[run.bucket]:
            raise PlanError(
                f"{where}: phase {run.turn} of the bucket comes where its phase {reached[run.bucket]} is due"
            )
        if run.slot < free_from[run.bucket]:
            raise PlanError(f"{where}: another phase of the bucket runs in this slot")
        other = busy.setdefault((run.slot, run.collective.scope), run.bucket)
        if other != run.bucket:
            raise PlanError(f"{where}: the link is busy with bucket {other}")
        reached[run.bucket] += 1
        free_from[run.bucket], last = run.slot + 1, run.slot
    if len(set(reached)) > 1:
        raise PlanError(f"buckets have different numbers of phases: {reached}")
    for member, steps in enumerate(plan.steps):
        if tuple(dict.fromkeys(step.run for step in steps)) != plan.runs:
            raise PlanError(f"member {member} runs other phases than the plan says, or in another order")


def _check_links(plan: RingCollective) -> None:
    """Require that no member sends or receives two messages on one link at one time, and none to itself."""
    for member, steps in enumerate(plan.steps):
        busy: dict[tuple[int, int, Scope], PlannedMessage] = {}
        for step in steps:
            time = (step.run.slot, step.number, step.run.collective.scope)
            if time in busy:
                raise PlanError(
                    f"member {member}, slot {step.run.slot}, step {step.number}: two messages "
                    f"{step.run.collective.scope} groups at once, of buckets {busy[time].run.bucket} and "
                    f"{step.run.bucket}"
                )
            busy[time] = step
            if member in (step.send.peer, step.receive.peer):
                raise PlanError(f"member {member}, {_where(step)}: a message to itself")
            together = _together(plan.groups, step.run.collective.scope, member)
            if not {step.send.peer, step.receive.peer} <= together:
                raise PlanError(f"member {member}, {_where(step)}: a peer that is not of {sorted(together)}")


def _together(groups: RankGroups, scope: Scope, member: int) -> set[int]:
    """Return the members that a link joins."""
    if scope is Scope.FLAT:
        return set(range(groups.ranks))
    if scope is Scope.INSIDE:
        return {other for other in range(groups.ranks) if other // groups.size == member // groups.size}
    return {other for other in range(groups.ranks) if other % groups.size == member % groups.size}


def _check_channels(plan: RingCollective) -> None:
    """Require that from each member to each other the sender sends what the receiver awaits, in one order."""
    sent: dict[tuple[int, int, Scope], list[tuple[PlannedMessage, ShardTransfer]]] = {}
    awaited: dict[tuple[int, int, Scope], list[tuple[PlannedMessage, ShardTransfer]]] = {}
    for member, steps in enumerate(plan.steps):
        for step in steps:
            scope = step.run.collective.scope
            sent.setdefault((member, step.send.peer, scope), []).append((step, step.send))
            awaited.setdefault((step.receive.peer, member, scope), []).append((step, step.receive))
    for channel in sorted(sent.keys() | awaited.keys()):
        sender, receiver, _ = channel
        ours, theirs = sent.get(channel, []), awaited.get(channel, [])
        if len(ours) != len(theirs):
            raise PlanError(f"member {sender} sends {len(ours)} messages to {receiver}, which awaits {len(theirs)}")
        for (step, piece), (other, expected) in zip(ours, theirs, strict=True):
            if (step.run, step.number, piece[1:]) != (other.run, other.number, expected[1:]):
                raise PlanError(
                    f"member {sender} sends shards {piece.begin} to {piece.end} in {_where(step)}, but {receiver} "
                    f"awaits {expected.begin} to {expected.end} in {_where(other)}"
                )


def _where(step: PlannedMessage) -> str:
    return f"slot {step.run.slot}, step {step.number}, bucket {step.run.bucket}"


def execute(plan: RingCollective) -> State:
    """Return what lies where after a plan, symbolically.

    Raises:
        PlanError: a shard is overwritten by one that came before, or counted twice.
    """
    ranks = range(plan.groups.ranks)
    state: State = [[_start(plan, member) for _ in range(plan.buckets)] for member in ranks]
    moments = sorted(((step.run.slot, step.number), member, step) for member in ranks for step in plan.steps[member])
    for _, together in groupby(moments, key=lambda moment: moment[0]):
        arrivals = [
            (step, member, state[member][step.run.bucket][step.send.begin : step.send.end])
            for _, member, step in together
        ]
        for step, member, shards in arrivals:
            _arrive(state[step.send.peer][step.run.bucket], step, member, shards)
    return state


def _start(plan: RingCollective, member: int) -> Buffer:
    """Return a bucket before the collective: one own shard to gather, or own gradients everywhere."""
    if plan.kind is CollectiveKind.ALL_GATHER:
        logical = plan.groups.logical(member)
        return [1 << member if shard == logical else 0 for shard in range(plan.groups.ranks)]
    return [1 << member] * plan.groups.ranks


def _arrive(buffer: Buffer, step: PlannedMessage, sender: int, shards: Buffer) -> None:
    for shard, content in enumerate(shards, step.send.begin):
        where = f"member {sender}, {_where(step)}: shard {shard}"
        if not content:
            raise PlanError(f"{where} is not there yet")
        if step.send.adds and buffer[shard] & content:
            raise PlanError(f"{where} is counted twice at {step.send.peer}")
        if not step.send.adds and buffer[shard] == content:
            raise PlanError(f"{where} was at {step.send.peer} before")
        buffer[shard] = buffer[shard] | content if step.send.adds else content


def _members(content: int) -> frozenset[int]:
    return frozenset(member for member in range(content.bit_length()) if content >> member & 1)


def _result(plan: RingCollective, state: State) -> dict[tuple[int, int, int], frozenset[int]]:
    """Return what members may use: after a scatter their own shard, else all."""
    result = {}
    for member, buckets in enumerate(state):
        mine = plan.groups.owned(Level.GLOBAL, member)
        for bucket, buffer in enumerate(buckets):
            for shard in mine if plan.kind is CollectiveKind.REDUCE_SCATTER else range(plan.groups.ranks):
                result[member, bucket, shard] = _members(buffer[shard])
    return result


def _check_result(plan: RingCollective, result: dict[tuple[int, int, int], frozenset[int]]) -> None:
    everyone = frozenset(range(plan.groups.ranks))
    for (member, bucket, shard), got in result.items():
        wanted = frozenset([plan.groups.member(shard)]) if plan.kind is CollectiveKind.ALL_GATHER else everyone
        if got != wanted:
            raise PlanError(
                f"member {member}, bucket {bucket}, shard {shard}: it ends with {sorted(got)}, not {sorted(wanted)}"
            )


def equals_flat(plan: RingCollective) -> bool:
    """Return whether a plan ends, on every member, with what the flat ring ends with."""
    plain = plan_ring_collective(plan.groups, plan.kind, CollectivesMode.FLAT, plan.buckets)
    return _result(plan, execute(plan)) == _result(plain, execute(plain))


def messages(plan: RingCollective) -> Iterator[tuple[int, PlannedMessage]]:
    """Yield every message with its sender."""
    for member, steps in enumerate(plan.steps):
        yield from ((member, step) for step in steps)


def _sent(plan: RingCollective) -> dict[Scope, int]:
    """Return the shards that every member sends on each link.

    Raises:
        PlanError: members send different amounts.
    """
    sent = [dict.fromkeys(Scope, 0) for _ in plan.steps]
    for member, step in messages(plan):
        sent[member][step.run.collective.scope] += step.send.end - step.send.begin
    for member, mine in enumerate(sent):
        if mine != sent[0]:
            raise PlanError(f"member {member} sends {mine} shards, member 0 sends {sent[0]}")
    return sent[0]
