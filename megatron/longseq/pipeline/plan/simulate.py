"""The clock: when every action of a schedule would begin and end, from what each one costs.

Only messages between ranks are waited for: what a rank needs from itself comes earlier in its own order, which
`proof` checks.
"""

from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from megatron.longseq.pipeline.plan.schedule import Action, Kind, Pipeline, Schedule, ScheduleError, source, target
from megatron.longseq.pipeline.plan.timeline import Span, Timeline

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds per model stage (0..P*V-1) and segment (0..K-1); one cost object serves all schedules.

    Attributes:
        forward: of the forward.
        backward: of the gradient of the inputs (of the whole backward where `weight` is 0).
        weight: of the gradient of the weights. A schedule without WEIGHT actions runs it as part of its backward.

    Raises:
        ValueError: tables of different shape, or a cost that is negative or not finite.
    """

    forward: Table
    backward: Table
    weight: Table

    def __post_init__(self) -> None:
        shapes = {tuple(map(len, table)) for table in (self.forward, self.backward, self.weight)}
        if len(shapes) > 1 or len(set(shapes.pop())) != 1:
            raise ValueError("forward, backward and weight costs need the same shape: stages x segments")
        for name in ("forward", "backward", "weight"):
            for stage, row in enumerate(getattr(self, name)):
                for segment, cost in enumerate(row):
                    if not (isfinite(cost) and cost >= 0):
                        raise ValueError(f"{name} cost of stage {stage}, segment {segment} is {cost}, not seconds")

    def table(self, kind: Kind, splits_weights: bool) -> Table:
        """Return the seconds of one kind of action in a schedule that splits weight gradients off, or does not."""
        if kind is Kind.FORWARD:
            return self.forward
        if kind is Kind.WEIGHT:
            return self.weight
        if splits_weights:
            return self.backward
        both = zip(self.backward, self.weight, strict=True)
        return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in both)


def uniform_costs(pipeline: Pipeline, forward: float = 1.0, backward: float = 2.0, weight: float = 0.0) -> Costs:
    """Return the same costs for every stage and segment: seconds per action."""
    forwards, backwards, weights = (
        ((cost,) * pipeline.segments,) * pipeline.depth for cost in (forward, backward, weight)
    )
    return Costs(forwards, backwards, weights)


def simulate(schedule: Schedule, costs: Costs, latency: float = 0.0, blocking: bool = False) -> Timeline:
    """Run a proven schedule against the clock, in time linear in its actions.

    Args:
        schedule: what every rank does.
        costs: seconds per action.
        latency: seconds from the end of an action until its output is on another rank.
        blocking: False: sends never wait and messages are buffered without bound. True: between two actions a rank
            posts the send of the one before and the receive of the one after together and waits for both (upstream's
            fused p2p); a message leaves when both its sides are posted.

    Raises:
        ScheduleError: ranks wait for each other in a circle; the message names their actions.
        ValueError: costs of another shape than the pipeline, or a negative latency.
    """
    pipeline = schedule.pipeline
    if (len(costs.forward), len(costs.forward[0])) != (pipeline.depth, pipeline.segments):
        raise ValueError(
            f"costs are for {len(costs.forward)} stages x {len(costs.forward[0])} segments, the pipeline has "
            f"{pipeline.depth} x {pipeline.segments}"
        )
    if latency < 0:
        raise ValueError(f"latency is {latency}, not seconds")
    steps = _steps(schedule, costs)
    starts = _blocking(schedule, steps, latency) if blocking else _buffered(schedule, steps, latency)
    spans = tuple(
        tuple(Span(action, start, start + step.seconds) for action, step, start in zip(*rank, strict=True))
        for rank in zip(schedule.orders, steps, starts, strict=True)
    )
    return Timeline(f"{schedule.name}, simulated", pipeline, spans)


class _Step(NamedTuple):
    """An action as the clock sees it: what it costs and the numbers of its messages, -1 where it has none."""

    seconds: float
    receives: int
    sends: int


def _steps(schedule: Schedule, costs: Costs) -> list[list[_Step]]:
    """Number the messages by the action that sends them: direction, stage, micro-batch, segment."""
    pipeline = schedule.pipeline
    stages, last, segments = pipeline.stages, pipeline.depth - 1, pipeline.segments
    splits = schedule.splits_weights
    tables = {kind: costs.table(kind, splits) for kind in Kind}
    steps = []
    for rank, order in enumerate(schedule.orders):
        mine = []
        for action in order:
            kind, stage = action.kind, action.vstage * stages + rank
            unit = (action.microbatch * segments + action.segment) * (last + 1) + stage
            receives = sends = -1
            if stages == 1:
                pass  # a rank sends itself nothing: its own order is all that counts
            elif kind is Kind.FORWARD:
                receives, sends = 2 * (unit - 1) if stage > 0 else -1, 2 * unit if stage < last else -1
            elif kind is Kind.BACKWARD:
                receives, sends = 2 * (unit + 1) + 1 if stage < last else -1, 2 * unit + 1 if stage > 0 else -1
            mine.append(_Step(tables[kind][stage][action.segment], receives, sends))
        steps.append(mine)
    return steps


def _buffered(schedule: Schedule, steps: list[list[_Step]], latency: float) -> list[list[float]]:
    """Return per rank the start of every action where sends never wait."""
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
    _check_done(schedule, starts, dict.fromkeys(waiting.values(), "receive"))
    return starts


def _blocking(schedule: Schedule, steps: list[list[_Step]], latency: float) -> list[list[float]]:
    """Return per rank the start of every action where a message leaves when both of its sides are posted.

    Gap i lies before action i: there the send of action i-1 and the receive of action i are posted together.
    """
    starts: list[list[float]] = [[] for _ in steps]
    gaps = [(0.0, -1, rank[0].receives if rank else -1) for rank in steps]  # when posted, the send, the receive
    posted: dict[tuple[int, int], float] = {}  # by side (0: the sender's, 1: the receiver's) and message
    waiting: dict[tuple[int, int], int] = {}
    held: dict[int, str] = {}
    ready = list(range(len(steps)))
    while ready:
        rank = ready.pop()
        mine, order = starts[rank], steps[rank]
        held.pop(rank, None)
        while True:
            now, *messages = gaps[rank]
            sides = [(side, message) for side, message in enumerate(messages) if message >= 0]
            for side in sides:
                posted.setdefault(side, now)
                if side in waiting:
                    ready.append(waiting.pop(side))
            others = [(1 - side, message) for side, message in sides]
            missing = [other for other in others if other not in posted]
            if missing:
                waiting.update(dict.fromkeys(missing, rank))
                held[rank] = "send" if missing[0][0] else "receive"
                break
            if len(mine) == len(order):
                break
            mine.append(max([now, *(max(now, posted[other]) + latency for other in others)]))
            seconds, _, sends = order[len(mine) - 1]
            gaps[rank] = (mine[-1] + seconds, sends, order[len(mine)].receives if len(mine) < len(order) else -1)
    _check_done(schedule, starts, held)
    return starts


def _check_done(schedule: Schedule, starts: list[list[float]], held: dict[int, str]) -> None:
    """Raise where ranks are held, with the chain of ranks that wait for each other."""
    if not held:
        return
    rank, chain, left = min(held), [], dict(held)
    while rank in left:
        action, index, peer, wanted = _wait(schedule, rank, len(starts[rank]), left.pop(rank))
        chain.append(f"rank {rank} waits in action {index} ({action}) {wanted} rank {peer}")
        rank = peer
    end = "which waits itself" if rank in held else "which has ended"
    raise ScheduleError(f"{schedule.name} never ends: {'; '.join(chain)}, {end}")


def _wait(schedule: Schedule, rank: int, reached: int, side: str) -> tuple[Action, int, int, str]:
    """Return the action that holds a rank, its index, the peer that it waits for, and what for, in words."""
    index = reached - (side == "send")
    action = schedule.orders[rank][index]
    other = (target if side == "send" else source)(schedule.pipeline, rank, action)
    assert other is not None, "only actions with a message can wait"
    return action, index, other[0], "to send its output to" if side == "send" else "for its input from"
