"""Simulate a schedule: when every action starts and ends, given what each one costs.

A rank waits for messages of other ranks only. What an action needs from its own rank comes earlier in that rank's
order, which `validate` checks.
"""

from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from megatron.longseq.pipeline.plan.schedule import (
    Action,
    ActionKind,
    Pipeline,
    Schedule,
    ScheduleError,
    source,
)

Table = tuple[tuple[float, ...], ...]  # seconds, by model stage and segment


@dataclass(frozen=True, slots=True)
class ActionTime:
    """When one action ran, or would run.

    Attributes:
        action: the action.
        start: seconds since the step began.
        end: seconds since the step began.
    """

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The times of all actions of one step, simulated here or measured by `runtime.step_timer`.

    Attributes:
        name: shown to the user, for instance "Seq1F1B, simulated".
        pipeline: sizes of the pipeline.
        spans: the times of each rank's actions, in order.
    """

    name: str
    pipeline: Pipeline
    spans: tuple[tuple[ActionTime, ...], ...]

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end over all ranks."""
        spans = [span for rank in self.spans for span in rank]
        return max(span.end for span in spans) - min(span.start for span in spans)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they compute nothing."""
        busy = sum(span.end - span.start for rank in self.spans for span in rank)
        return bubble_share(busy, len(self.spans), self.makespan)


def bubble_share(busy: float, ranks: int, makespan: float) -> float:
    """Return the share of the ranks' time in which they compute nothing.

    Args:
        busy: seconds in which a rank computes, summed over the ranks.
        ranks: number of ranks.
        makespan: seconds from the first start to the last end over all ranks.
    """
    return 1.0 - busy / (ranks * makespan)


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds per model stage (0..P*V-1) and segment (0..K-1), for any schedule.

    Attributes:
        forward: seconds of the forward.
        backward: seconds of the gradients of inputs, or of the whole backward where `weight` is 0.
        weight: seconds of the gradients of weights. A schedule without WEIGHT actions adds them to the backward.

    Raises:
        ValueError: the tables differ in shape, or a cost is negative or not finite.
    """

    forward: Table
    backward: Table
    weight: Table

    def __post_init__(self) -> None:
        shapes = {tuple(map(len, table)) for table in (self.forward, self.backward, self.weight)}
        if len(shapes) > 1 or len(set(shapes.pop())) != 1:
            raise ValueError("forward, backward and weight costs must have the same shape, stages x segments")
        for name in ("forward", "backward", "weight"):
            for stage, row in enumerate(getattr(self, name)):
                for segment, cost in enumerate(row):
                    if not (isfinite(cost) and cost >= 0):
                        raise ValueError(f"{name} cost of stage {stage}, segment {segment} is {cost}, not seconds")

    def table(self, kind: ActionKind, splits_weights: bool) -> Table:
        """Return the seconds of one kind of action; without `splits_weights` a backward includes weight gradients.

        Args:
            kind: kind of the action.
            splits_weights: whether the schedule has WEIGHT actions.

        Returns:
            Seconds by model stage and segment, [P * V][K].
        """
        if kind is ActionKind.FORWARD:
            return self.forward
        if kind is ActionKind.WEIGHT:
            return self.weight
        if splits_weights:
            return self.backward
        both = zip(self.backward, self.weight, strict=True)
        return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in both)


def uniform_costs(pipeline: Pipeline, forward: float = 1.0, backward: float = 2.0, weight: float = 0.0) -> Costs:
    """Return costs in seconds that are the same for every stage and segment.

    Args:
        pipeline: sizes of the pipeline.
        forward, backward, weight: seconds of an action of each kind, see `Costs`.
    """
    forwards, backwards, weights = (
        ((cost,) * pipeline.segments,) * pipeline.depth for cost in (forward, backward, weight)
    )
    return Costs(forwards, backwards, weights)


def simulate(schedule: Schedule, costs: Costs, latency: float = 0.0) -> Timeline:
    """Return when each action of a schedule runs, if sends never wait and messages are buffered without bound.

    This takes time linear in the number of actions.

    Args:
        schedule: a validated schedule.
        costs: seconds per action.
        latency: seconds from the end of an action until its output has reached another rank.

    Raises:
        ScheduleError: the ranks deadlock; the message names the actions that wait for each other.
        ValueError: the costs do not have the pipeline's shape, or the latency is negative.
    """
    pipeline = schedule.pipeline
    if (len(costs.forward), len(costs.forward[0])) != (pipeline.depth, pipeline.segments):
        raise ValueError(
            f"costs have shape {len(costs.forward)} stages x {len(costs.forward[0])} segments, but the pipeline has "
            f"{pipeline.depth} x {pipeline.segments}"
        )
    if latency < 0:
        raise ValueError(f"latency is {latency}, not seconds")
    steps = _steps(schedule, costs)
    starts = _starts(schedule, steps, latency)
    spans = tuple(
        tuple(ActionTime(action, start, start + step.seconds) for action, step, start in zip(*rank, strict=True))
        for rank in zip(schedule.orders, steps, starts, strict=True)
    )
    return Timeline(f"{schedule.name}, simulated", pipeline, spans)


class _Step(NamedTuple):
    """Cost of an action and the numbers of the messages that it receives and sends, -1 for none."""

    seconds: float
    receives: int
    sends: int


def _steps(schedule: Schedule, costs: Costs) -> list[list[_Step]]:
    """Return the steps of every rank. A message's number identifies the action that sends it."""
    pipeline = schedule.pipeline
    stages, last, segments = pipeline.stages, pipeline.depth - 1, pipeline.segments
    splits = schedule.splits_weights
    tables = {kind: costs.table(kind, splits) for kind in ActionKind}
    steps = []
    for rank, order in enumerate(schedule.orders):
        mine = []
        for action in order:
            kind, stage = action.kind, action.vstage * stages + rank
            unit = (action.microbatch * segments + action.segment) * (last + 1) + stage
            receives = sends = -1
            if stages == 1:
                pass  # one rank sends no messages
            elif kind is ActionKind.FORWARD:
                receives, sends = 2 * (unit - 1) if stage > 0 else -1, 2 * unit if stage < last else -1
            elif kind is ActionKind.BACKWARD:
                receives, sends = 2 * (unit + 1) + 1 if stage < last else -1, 2 * unit + 1 if stage > 0 else -1
            mine.append(_Step(tables[kind][stage][action.segment], receives, sends))
        steps.append(mine)
    return steps


def _starts(schedule: Schedule, steps: list[list[_Step]], latency: float) -> list[list[float]]:
    """Return the start of every rank's actions."""
    starts: list[list[float]] = [[] for _ in steps]
    clocks = [0.0] * len(steps)
    arrivals = {-1: 0.0}
    waiting: dict[int, int] = {}
    ready = list(range(len(steps)))
    while ready:
        rank = ready.pop()
        mine, clock = starts[rank], clocks[rank]
        for index in range(len(mine), len(steps[rank])):
            seconds, receives, sends = steps[rank][index]
            if receives not in arrivals:
                waiting[receives] = rank
                break
            start = max(clock, arrivals[receives])
            mine.append(start)
            clock = start + seconds
            if sends >= 0:
                arrivals[sends] = clock + latency
                if sends in waiting:
                    ready.append(waiting.pop(sends))
        clocks[rank] = clock
    _check_done(schedule, starts, set(waiting.values()))
    return starts


def _check_done(schedule: Schedule, starts: list[list[float]], blocked: set[int]) -> None:
    """Raise an error that names the chain of ranks that wait for each other, if any rank is blocked."""
    if not blocked:
        return
    rank, chain, left = min(blocked), [], set(blocked)
    while rank in left:
        left.remove(rank)
        index = len(starts[rank])
        action = schedule.orders[rank][index]
        sender = source(schedule.pipeline, rank, action)
        assert sender is not None, "only actions with a message can wait"
        chain.append(f"rank {rank} waits in action {index} ({action}) for its input from rank {sender[0]}")
        rank = sender[0]
    end = "which is waiting too" if rank in blocked else "which has ended"
    raise ScheduleError(f"{schedule.name} deadlocks: {'; '.join(chain)}, {end}")
