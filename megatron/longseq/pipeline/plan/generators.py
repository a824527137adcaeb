"""The orders in which ranks run their actions, one generator per schedule.

Every generator is a pure function of the sizes, so all ranks derive the same schedule without talking to each other.
Two facts hold in all of them: forwards run by rising micro-batch and segment; backwards are first in, first out over
micro-batches and last in, first out over segments, because segment s adds to the gradients of the keys of 0..s-1.
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

_ROUNDING = 1e-6  # a weight gradient may end this share of itself after the arrival that it must not delay


def make(
    pipeline: Pipeline,
    *,
    slack: int = 0,
    zero_bubble: bool = False,
    group: int | None = None,
    costs: Costs | None = None,
) -> Schedule:
    """Return the schedule that the flags ask for.

    Args:
        pipeline: the sizes.
        slack: extra forwards that a rank runs ahead per stage that follows it, in segments.
        zero_bubble: whether weight gradients are actions of their own.
        group: micro-batches per group with virtual stages (upstream's
            `--microbatch-group-size-per-virtual-pipeline-stage`); None: the smallest that is possible.
        costs: what a zero-bubble schedule is fitted to, the same on all ranks; None: all actions cost the same.

    Raises:
        ScheduleError: there is no such schedule for these sizes; the message says which sizes work.
    """
    if zero_bubble:
        return zb_h1(pipeline, slack, costs)
    if pipeline.virtual > 1:
        return interleaved(pipeline, slack, group)
    return one_f_one_b(pipeline, slack)


def one_f_one_b(pipeline: Pipeline, slack: int = 0) -> Schedule:
    """1F1B, and with more than one segment Seq1F1B.

    Rank r of P runs P-r-1 + (K-1) + slack*(P-r-1) segments forward, then one forward and one backward in turn. The
    K-1 make the last rank's first backward legal: it is the one of the last segment.

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
    """Interleaved 1F1B, and with more than one segment Seq1F1B-I.

    A group of micro-batches runs through all virtual stages of a rank before the next group begins. The group has at
    least P segments, so that its first segment is back from the last rank when rank 0 has sent its last one out; with
    slack P * (2 + slack) / 2, or the forwards that ranks run ahead would reach into a group whose segments are not
    back (upstream's rules, read in segments, are the case without slack).

    Args:
        pipeline: the sizes.
        slack: extra forwards that a rank runs ahead per stage that follows it, in segments.
        group: micro-batches per group; None: the fewest that have as many segments.

    Raises:
        ScheduleError: there are no virtual stages, the group is too small or larger than the number of micro-batches,
            the last group would have too few segments, or the slack is negative.
    """
    if pipeline.virtual == 1:
        raise ScheduleError("interleaving needs at least 2 virtual stages per rank: use one_f_one_b()")
    least = _smallest_group(pipeline, slack)
    group = least if group is None else group
    _check_group(pipeline, group, least)
    orders = []
    for rank in range(pipeline.stages):
        after = pipeline.stages - rank - 1
        ahead = 2 * after + (pipeline.virtual - 1) * group * pipeline.segments + pipeline.segments - 1
        orders.append(_alternate(pipeline, ahead + _extra(slack, after), group))
    return Schedule(_name(pipeline, "1F1B-I", "Seq1F1B-I", slack), pipeline, tuple(orders))


def zb_h1(pipeline: Pipeline, slack: int = 0, costs: Costs | None = None) -> Schedule:
    """ZB-H1 (zero bubble, arXiv 2401.10241) and its sequence-level form; with slack 1 like ZB-H2.

    Forwards and input gradients run in the order of 1F1B. A weight gradient fills the time in which the next of them
    is not there yet, if it ends before that arrives, or makes room: a rank keeps as many segments alive, from forward
    to weight gradient, as rank 0 of 1F1B does. Where that time is, is found by running the step against the clock.
    With uniform costs F, B, W of a segment and slack e the bubble takes
    (P-1) * max(F, B - e*F, F + B - (1+e)*W) seconds; that of 1F1B takes (P-1) * (F + B + W).

    Args:
        pipeline: the sizes.
        slack: extra forwards that a rank runs ahead per stage that follows it, in segments.
        costs: what the order is fitted to, the same on all ranks; None: F = B = W.

    Raises:
        ScheduleError: the pipeline has virtual stages, or the slack is negative.
    """
    if pipeline.virtual > 1:
        raise ScheduleError(
            f"zero-bubble has one virtual stage per rank, not {pipeline.virtual}: virtual stages already divide the "
            "bubble and hold the memory that delayed weight gradients need; drop one of the two"
        )
    limit = pipeline.stages + pipeline.segments - 1 + _extra(slack, pipeline.stages - 1)
    costs = uniform_costs(pipeline, 1, 1, 1) if costs is None else costs
    fused = one_f_one_b(pipeline, slack)
    ranks = [_Filler(order, costs.weight[rank], limit) for rank, order in enumerate(fused.orders)]
    _fill(pipeline, ranks, costs)
    return Schedule(_name(pipeline, "ZB-H1", "Seq-ZB-H1", slack), pipeline, tuple(tuple(rank.order) for rank in ranks))


def forward_only(pipeline: Pipeline, group: int | None = None) -> Schedule:
    """Forwards alone, for evaluation; any number of micro-batches and of virtual stages."""
    order = tuple(_forwards(pipeline, _smallest_group(pipeline) if group is None else group))
    return Schedule("forward only", pipeline, (order,) * pipeline.stages)


def _alternate(pipeline: Pipeline, ahead: int, group: int) -> tuple[Action, ...]:
    """Run `ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
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
    """One rank of a zero-bubble schedule in the making.

    Attributes:
        order: the actions placed so far.
        free: when the last of them ends.
        arrivals: when the inputs of forwards and backwards arrive.
    """

    def __init__(self, fused: tuple[Action, ...], seconds: tuple[float, ...], limit: int) -> None:
        self.order: list[Action] = []
        self.free = 0.0
        self.arrivals: dict[Action, float] = {}
        self._fused, self._seconds, self._room = deque(fused), seconds, limit
        self._weights: deque[Action] = deque()

    def begins(self) -> float:
        """Return when the next forward or backward can begin, as far as is known: inf without input, or room."""
        if not self._fused or (self._fused[0].kind is ActionKind.FORWARD and not self._room):
            return inf
        return self.arrivals.get(self._fused[0], inf)

    def choose(self, now: float) -> Action | None:
        """Return what runs now: the next forward or backward, else a weight gradient that does not delay it."""
        if self.begins() <= now:
            return self._fused[0]
        if self._weights and now + self._seconds[self._weights[0].segment] * (1 - _ROUNDING) <= self.begins():
            return self._weights[0]
        return None

    def place(self, action: Action, end: float) -> None:
        """Run `action`, which `choose` returned, until `end`."""
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
    """Run the step against the clock and let every rank place its actions."""
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
        raise ScheduleError(f"slack is a number of segments from 0, not {slack}")
    return slack * after


def _smallest_group(pipeline: Pipeline, slack: int = 0) -> int:
    """Return the fewest micro-batches that have ceil(P * (2 + slack) / 2) segments."""
    segments = -(-pipeline.stages * (2 + slack) // 2)
    return -(-segments // pipeline.segments)


def _check_group(pipeline: Pipeline, group: int, least: int) -> None:
    """Refuse a group that lets ranks wait for each other in a circle, or the pipe run dry between groups."""
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
