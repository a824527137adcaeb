"""Generate schedules: the order in which each rank runs its actions.

Every generator is a pure function of the sizes, so all ranks derive the same schedule without communication. In all of
them forwards run by rising micro-batch and segment. Backwards run first in, first out over micro-batches and last in,
first out over segments, because segment s contributes to the gradients of the keys of segments 0..s-1.
"""

import heapq
from collections import deque
from itertools import chain
from math import inf

from megatron.longseq.pipeline.plan.schedule import (
    Action,
    ActionKind,
    Pipeline,
    Schedule,
    ScheduleError,
    source,
    target,
)
from megatron.longseq.pipeline.plan.simulate import Costs, uniform_costs

_ROUNDING = 1e-6  # tolerance, as a share of its duration, for a weight gradient that ends when an input arrives


def make(
    pipeline: Pipeline,
    *,
    slack: int = 0,
    zero_bubble: bool = False,
    group: int | None = None,
    costs: Costs | None = None,
) -> Schedule:
    """Return the training schedule for some sizes and flags.

    Args:
        pipeline: sizes of the pipeline.
        slack: extra segments that a rank runs forward before its first backward, per downstream stage.
        zero_bubble: whether weight gradients are actions of their own.
        group: micro-batches per group with virtual stages (upstream's
            `--microbatch-group-size-per-virtual-pipeline-stage`); None: the smallest possible.
        costs: costs to which a zero-bubble schedule is fitted, the same on all ranks; None: all actions cost the same.

    Raises:
        ScheduleError: there is no such schedule for these sizes; the message says which sizes work.
    """
    if zero_bubble:
        return zb_h1(pipeline, slack, costs)
    if pipeline.virtual > 1:
        return interleaved(pipeline, slack, group)
    return one_f_one_b(pipeline, slack)


def one_f_one_b(pipeline: Pipeline, slack: int = 0) -> Schedule:
    """Return the schedule 1F1B or, with more than one segment, Seq1F1B (arXiv 2406.03488, section 3).

    Rank r of P runs P-r-1 + (K-1) + slack*(P-r-1) segments forward, and then alternates one forward and one backward.
    The term K-1 is needed because the first backward is that of a micro-batch's last segment.

    Args:
        pipeline: sizes of the pipeline.
        slack: extra segments that a rank runs forward before its first backward, per downstream stage.

    Raises:
        ScheduleError: the pipeline has virtual stages, or the slack is negative.
    """
    if pipeline.virtual > 1:
        raise ScheduleError(f"1F1B has one virtual stage per rank, not {pipeline.virtual}: use interleaved()")
    orders = []
    for rank in range(pipeline.stages):
        after = pipeline.stages - rank - 1
        orders.append(_alternate(pipeline, after + pipeline.segments - 1 + _extra(slack, after), 1))
    return Schedule(_name(pipeline, "1F1B", "Seq1F1B", slack), pipeline, tuple(orders))


def interleaved(pipeline: Pipeline, slack: int = 0, group: int | None = None) -> Schedule:
    """Return the schedule interleaved 1F1B or, with more than one segment, Seq1F1B-I.

    A group of micro-batches runs through all virtual stages of a rank before the next group starts. A group needs at
    least P segments, so that its first segment has returned from the last rank when rank 0 has sent its last one. With
    slack it needs P * (2 + slack) / 2 segments; otherwise the forwards that run ahead would need segments of the next
    group that have not returned. Without slack these are upstream's rules, applied to segments.

    Args:
        pipeline, slack, group: see `make`.

    Raises:
        ScheduleError: there are no virtual stages, the group is too small or larger than the number of micro-batches,
            the last group would have too few segments, or the slack is negative.
    """
    if pipeline.virtual == 1:
        raise ScheduleError("interleaving needs at least 2 virtual stages per rank: use one_f_one_b()")
    least = smallest_group(pipeline, slack)
    group = least if group is None else group
    _check_group(pipeline, group, least)
    orders = []
    for rank in range(pipeline.stages):
        after = pipeline.stages - rank - 1
        ahead = 2 * after + (pipeline.virtual - 1) * group * pipeline.segments + pipeline.segments - 1
        orders.append(_alternate(pipeline, ahead + _extra(slack, after), group))
    return Schedule(_name(pipeline, "1F1B-I", "Seq1F1B-I", slack), pipeline, tuple(orders))


def zb_h1(pipeline: Pipeline, slack: int = 0, costs: Costs | None = None) -> Schedule:
    """Return the schedule ZB-H1 (arXiv 2401.10241) or its sequence-level form; with slack 1 it resembles ZB-H2.

    Forwards and input gradients run in the order of 1F1B. A weight gradient runs while the rank waits for the input of
    the next of them, if it ends before that input arrives. It also runs if the rank has no room for another forward: a
    rank keeps at most as many segments, from forward to weight gradient, as rank 0 of 1F1B. The waiting times are found
    by simulating the step. With uniform costs F, B, W per segment and slack e the bubble takes
    (P-1) * max(F, B - e*F, F + B - (1+e)*W) seconds; that of 1F1B takes (P-1) * (F + B + W).

    Args:
        pipeline, slack, costs: see `make`.

    Raises:
        ScheduleError: the pipeline has virtual stages, or the slack is negative.
    """
    if pipeline.virtual > 1:
        raise ScheduleError(
            f"zero-bubble has one virtual stage per rank, not {pipeline.virtual}; leave --zero-bubble or the virtual "
            "stages out"
        )
    limit = pipeline.stages + pipeline.segments - 1 + _extra(slack, pipeline.stages - 1)
    costs = uniform_costs(pipeline, 1, 1, 1) if costs is None else costs
    fused = one_f_one_b(pipeline, slack)
    ranks = [_Filler(order, costs.weight[rank], limit) for rank, order in enumerate(fused.orders)]
    _fill(pipeline, ranks, costs)
    return Schedule(_name(pipeline, "ZB-H1", "Seq-ZB-H1", slack), pipeline, tuple(tuple(rank.order) for rank in ranks))


def forward_only(pipeline: Pipeline, group: int | None = None) -> Schedule:
    """Return a schedule of forwards only, for evaluation, with any number of micro-batches and virtual stages.

    Args:
        pipeline: sizes of the pipeline.
        group: micro-batches per group with virtual stages; None: the smallest possible.
    """
    order = tuple(_forwards(pipeline, smallest_group(pipeline) if group is None else group))
    return Schedule("forward only", pipeline, (order,) * pipeline.stages)


def _alternate(pipeline: Pipeline, ahead: int, group: int) -> tuple[Action, ...]:
    """Return `ahead` forwards, then a forward and a backward in turn, then the remaining backwards."""
    forwards, backwards = _forwards(pipeline, group), _backwards(pipeline, group)
    steady = chain.from_iterable(zip(forwards[ahead:], backwards, strict=False))
    return (*forwards[:ahead], *steady, *backwards[max(len(forwards) - ahead, 0) :])


def _forwards(pipeline: Pipeline, group: int) -> list[Action]:
    return [
        Action(ActionKind.FORWARD, microbatch, segment, vstage)
        for first in range(0, pipeline.microbatches, group)
        for vstage in range(pipeline.virtual)
        for microbatch in range(first, min(first + group, pipeline.microbatches))
        for segment in range(pipeline.segments)
    ]


def _backwards(pipeline: Pipeline, group: int) -> list[Action]:
    return [
        Action(ActionKind.BACKWARD, microbatch, segment, vstage)
        for first in range(0, pipeline.microbatches, group)
        for vstage in reversed(range(pipeline.virtual))
        for microbatch in range(first, min(first + group, pipeline.microbatches))
        for segment in reversed(range(pipeline.segments))
    ]


class _Filler:
    """Places the actions of one rank of a zero-bubble schedule.

    Attributes:
        order: actions placed so far.
        free: time at which the last of them ends.
        arrivals: times at which the inputs of forwards and backwards arrive.
    """

    def __init__(self, fused: tuple[Action, ...], seconds: tuple[float, ...], limit: int) -> None:
        self.order: list[Action] = []
        self.free = 0.0
        self.arrivals: dict[Action, float] = {}
        self._fused, self._seconds, self._room = deque(fused), seconds, limit
        self._weights: deque[Action] = deque()

    def begins(self) -> float:
        """Return when the next forward or backward can start: inf without its input, or without room for a forward."""
        if not self._fused or (self._fused[0].kind is ActionKind.FORWARD and not self._room):
            return inf
        return self.arrivals.get(self._fused[0], inf)

    def choose(self, now: float) -> Action | None:
        """Return the action to run now: the next forward or backward, or a weight gradient that does not delay it."""
        if self.begins() <= now:
            return self._fused[0]
        if self._weights and now + self._seconds[self._weights[0].segment] * (1 - _ROUNDING) <= self.begins():
            return self._weights[0]
        return None

    def place(self, action: Action, end: float) -> None:
        """Append an action that `choose` returned, which ends at `end`."""
        self.order.append(action)
        self.free = end
        if action.kind is ActionKind.WEIGHT:
            self._weights.popleft()
            self._room += 1
            return
        self._fused.popleft()
        if action.kind is ActionKind.FORWARD:
            self._room -= 1
        else:
            self._weights.append(Action(ActionKind.WEIGHT, action.microbatch, action.segment))


def _fill(pipeline: Pipeline, ranks: list[_Filler], costs: Costs) -> None:
    """Simulate the step, with every rank placing its actions."""
    seconds = {kind: costs.table(kind, splits_weights=True) for kind in ActionKind}
    for number, rank in enumerate(ranks):
        for action in _forwards(pipeline, 1) + _backwards(pipeline, 1):
            if source(pipeline, number, action) is None:
                rank.arrivals[action] = 0.0
    events = [(0.0, number) for number in range(len(ranks))]
    while events:
        now, number = heapq.heappop(events)
        rank = ranks[number]
        if now < rank.free:
            continue
        chosen = rank.choose(now)
        if chosen is None:
            if now < rank.begins() < inf:
                heapq.heappush(events, (rank.begins(), number))
            continue
        end = now + seconds[chosen.kind][number][chosen.segment]
        rank.place(chosen, end)
        heapq.heappush(events, (end, number))
        receiver = target(pipeline, number, chosen)
        if receiver is not None:
            peer, awaited = receiver
            ranks[peer].arrivals[awaited] = end
            heapq.heappush(events, (end, peer))


def _extra(slack: int, after: int) -> int:
    if slack < 0:
        raise ScheduleError(f"slack must be at least 0 segments, not {slack}")
    return slack * after


def smallest_group(pipeline: Pipeline, slack: int = 0) -> int:
    """Return the least size of a group with virtual stages: micro-batches that have ceil(P * (2 + slack) / 2) segments.

    It is the default group size, so with virtual stages the micro-batches of a step are a multiple of it.

    Args:
        pipeline: sizes of the pipeline.
        slack: see `one_f_one_b`.
    """
    segments = -(-pipeline.stages * (2 + slack) // 2)
    return -(-segments // pipeline.segments)


def _check_group(pipeline: Pipeline, group: int, least: int) -> None:
    """Refuse a group with which ranks would deadlock, or the pipeline would drain between groups."""
    microbatches, left = pipeline.microbatches, pipeline.microbatches % group if group > 0 else 0
    sizes = f"{pipeline.stages} pipeline stages, {pipeline.segments} segments per sequence"
    if group < least:
        raise ScheduleError(
            f"a group of {group} micro-batches is too small ({sizes}): use at least {least} micro-batches per group"
        )
    if microbatches < group:
        raise ScheduleError(
            f"a group of {group} micro-batches ({sizes}) is more than the {microbatches} of a step: use at least "
            f"{group} micro-batches per step"
        )
    if 0 < left < least:
        whole = microbatches - left
        raise ScheduleError(
            f"{microbatches} micro-batches in groups of {group} leave {left} for the last group, which needs at least "
            f"{least} ({sizes}): use {whole} or {whole + least} micro-batches per step"
        )


def _name(pipeline: Pipeline, whole: str, split: str, slack: int) -> str:
    return (split if pipeline.segments > 1 else whole) + (f", slack {slack}" if slack else "")
