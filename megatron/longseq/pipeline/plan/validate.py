"""Validate a schedule: it computes every gradient once, in a legal order, and does not deadlock."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron.longseq.pipeline.plan.schedule import (
    Action,
    ActionKind,
    Pipeline,
    Schedule,
    ScheduleError,
    source,
    target,
)
from megatron.longseq.pipeline.plan.simulate import simulate, uniform_costs

Edge = tuple[ActionKind, int, int]  # direction, sender, receiver; the messages of an edge keep their order


@dataclass(frozen=True, slots=True)
class Proof:
    """Properties of a schedule that `prove` has accepted.

    Attributes:
        schedule: the schedule.
        peak_units: per rank the peak of live units. A unit is a segment on a virtual stage; it is live from its forward
            to its last backward or weight gradient. 0 in a schedule of forwards only.
    """

    schedule: Schedule
    peak_units: tuple[int, ...]

    def peak_live(self, lengths: Sequence[int] | None = None) -> tuple[float, ...]:
        """Return per rank the peak of live activations, in units of one whole sequence on all of the rank's stages.

        Args:
            lengths: tokens per segment; None: equal lengths.

        Raises:
            ValueError: there is not one length per segment.
        """
        pipeline = self.schedule.pipeline
        lengths = (1,) * pipeline.segments if lengths is None else lengths
        if len(lengths) != pipeline.segments or min(lengths) < 0 or not sum(lengths):
            raise ValueError(f"{pipeline.segments} segments need as many lengths of at least 0, not {list(lengths)}")
        freed = _freed(self.schedule)
        whole = sum(lengths) * pipeline.virtual
        return tuple(
            max(_live(order, {kind: freed[kind] / whole for kind in ActionKind}, lengths), default=0.0)
            for order in self.schedule.orders
        )


@lru_cache(maxsize=32)
def prove(schedule: Schedule) -> Proof:
    """Validate a schedule.

    Raises:
        ScheduleError: an action is missing, duplicated or outside of the pipeline's sizes; it runs before an action of
            its own rank that it needs; the forwards of a virtual stage are not in the order of its data iterator; two
            ranks disagree on the order of their messages; or ranks deadlock. The message names rank, index and action.
    """
    pipeline = schedule.pipeline
    if len(schedule.orders) != pipeline.stages:
        raise ScheduleError(f"{schedule.name} has {len(schedule.orders)} orders, not {pipeline.stages}, one per rank")
    kinds = [ActionKind.FORWARD]
    if not schedule.is_forward_only:
        kinds += [ActionKind.BACKWARD, ActionKind.WEIGHT] if schedule.splits_weights else [ActionKind.BACKWARD]
    expected = set(_all_actions(pipeline, kinds))
    for rank, order in enumerate(schedule.orders):
        _check_complete(rank, order, expected)
        _check_order(pipeline, rank, order)
        _check_data(pipeline, rank, order)
    _check_messages(schedule)
    simulate(schedule, uniform_costs(pipeline))
    freed = _freed(schedule)
    ones = (1,) * pipeline.segments
    peaks = tuple(round(max(_live(order, freed, ones), default=0)) for order in schedule.orders)
    return Proof(schedule, peaks)


def _all_actions(pipeline: Pipeline, kinds: list[ActionKind]) -> Iterator[Action]:
    for kind in kinds:
        for microbatch in range(pipeline.microbatches):
            for segment in range(pipeline.segments):
                for vstage in range(pipeline.virtual):
                    yield Action(kind, microbatch, segment, vstage)


def _check_complete(rank: int, order: Sequence[Action], expected: set[Action]) -> None:
    """Require every action exactly once."""
    first: dict[Action, int] = {}
    for index, action in enumerate(order):
        if action not in expected:
            raise ScheduleError(f"rank {rank}, action {index}: the {action} does not belong to this pipeline")
        if action in first:
            raise ScheduleError(f"rank {rank}, action {index}: the {action} is also action {first[action]}")
        first[action] = index
    missing = expected - first.keys()
    if missing:
        raise ScheduleError(f"rank {rank} never runs the {min(missing)} (it has {len(order)} actions)")


def _check_order(pipeline: Pipeline, rank: int, order: Sequence[Action]) -> None:
    """Require that every action runs after the actions of its own rank that it needs."""
    index = {action: number for number, action in enumerate(order)}
    for action, number in index.items():
        for needed, why in _needs(pipeline, rank, action):
            if index[needed] > number:
                raise ScheduleError(
                    f"rank {rank}, action {number}: the {action} runs before the {needed} (action {index[needed]}), "
                    f"which {why}"
                )


def _needs(pipeline: Pipeline, rank: int, action: Action) -> Iterator[tuple[Action, str]]:
    """Yield the actions of its own rank that `action` needs, and why."""
    microbatch, segment, vstage = action.microbatch, action.segment, action.vstage
    if action.kind is ActionKind.FORWARD and segment > 0:
        yield Action(ActionKind.FORWARD, microbatch, segment - 1, vstage), "gives the keys of the tokens before"
    if action.kind is ActionKind.BACKWARD:
        yield Action(ActionKind.FORWARD, microbatch, segment, vstage), "gives its activations"
        if segment < pipeline.segments - 1:
            yield Action(ActionKind.BACKWARD, microbatch, segment + 1, vstage), "adds to the gradients of its keys"
    if action.kind is ActionKind.WEIGHT:
        yield Action(ActionKind.BACKWARD, microbatch, segment, vstage), "gives the gradients of its outputs"
    sender = source(pipeline, rank, action)
    if sender is not None and sender[0] == rank:
        yield sender[1], "gives its input"


def _check_data(pipeline: Pipeline, rank: int, order: Sequence[Action]) -> None:
    """Require that each virtual stage runs its forwards by rising micro-batch and segment.

    A virtual stage reads a micro-batch from its data iterator at the first segment, keeps it until the last segment,
    and reports losses in this order. Backwards need no such rule, since what they use is kept per micro-batch.
    """
    expected = dict.fromkeys(range(pipeline.virtual), 0)
    for index, action in enumerate(order):
        if action.kind is not ActionKind.FORWARD:
            continue
        unit = expected[action.vstage]
        if (action.microbatch, action.segment) != divmod(unit, pipeline.segments):
            missing = Action(ActionKind.FORWARD, *divmod(unit, pipeline.segments), action.vstage)
            raise ScheduleError(
                f"rank {rank}, action {index}: the {action} runs before the {missing}, but each virtual stage must "
                "run micro-batches forward in the order of the data iterator"
            )
        expected[action.vstage] += 1


def _check_messages(schedule: Schedule) -> None:
    """Require that the messages of every edge are sent in the order in which they are received."""
    pipeline = schedule.pipeline
    sent: dict[Edge, list[tuple[int, Action]]] = {}
    received: dict[Edge, list[tuple[int, Action]]] = {}
    for rank, order in enumerate(schedule.orders):
        for index, action in enumerate(order):
            receiver, sender = target(pipeline, rank, action), source(pipeline, rank, action)
            if receiver is not None:
                sent.setdefault((action.kind, rank, receiver[0]), []).append((index, receiver[1]))
            if sender is not None:
                received.setdefault((action.kind, sender[0], rank), []).append((index, action))
    for edge, messages in sent.items():
        for (index, message), (awaits, awaited) in zip(messages, received[edge], strict=True):
            if message != awaited:
                raise ScheduleError(
                    f"rank {edge[1]}, action {index} sends the input of the {message}, but rank {edge[2]} receives "
                    f"in a different order: its action {awaits} expects the input of the {awaited}"
                )


def _freed(schedule: Schedule) -> dict[ActionKind, float]:
    """Return by how many live units an action of each kind changes their number."""
    if schedule.is_forward_only:
        return dict.fromkeys(ActionKind, 0.0)
    kept = float(schedule.splits_weights)  # until the weight gradient
    return {ActionKind.FORWARD: 1.0, ActionKind.BACKWARD: kept - 1.0, ActionKind.WEIGHT: -kept}


def _live(order: Sequence[Action], change: dict[ActionKind, float], lengths: Sequence[int]) -> Iterator[float]:
    """Yield the live units, weighted by length, after each action."""
    alive = 0.0
    for action in order:
        alive += change[action.kind] * lengths[action.segment]
        yield alive
