"""The orders in which ranks run their actions, one generator per schedule.

Every generator is a pure function of the sizes, so all ranks derive the same schedule without talking to each other.
Two facts hold in all of them: forwards run by rising micro-batch and segment; backwards are first in, first out over
micro-batches and last in, first out over segments, because segment s adds to the gradients of the keys of 0..s-1.
"""

from itertools import chain

from megatron.longseq.pipeline.action import Action, Kind, Pipeline, Schedule, ScheduleError


def make(pipeline: Pipeline, *, slack: int = 0, zero_bubble: bool = False, group: int | None = None) -> Schedule:
    """Return the schedule that the flags ask for.

    Args:
        pipeline: the sizes.
        slack: extra forwards that a rank runs ahead per stage that follows it, in segments.
        zero_bubble: whether weight gradients are actions of their own.
        group: micro-batches per group with virtual stages (upstream's
            `--microbatch-group-size-per-virtual-pipeline-stage`); None: the smallest that is possible.

    Raises:
        ScheduleError: there is no such schedule for these sizes; the message says which sizes work.
    """
    if zero_bubble:
        raise ScheduleError("there is no zero-bubble schedule yet: run without --zero-bubble")
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
    return Schedule(_name(pipeline, "1F1B", slack), pipeline, tuple(orders))


def interleaved(pipeline: Pipeline, slack: int = 0, group: int | None = None) -> Schedule:
    """Interleaved 1F1B, and with more than one segment Seq1F1B-I.

    A group of micro-batches runs through all virtual stages of a rank before the next group begins. The group has at
    least P segments, so that its first segment is back from the last rank when rank 0 has sent its last one out.

    Args:
        pipeline: the sizes.
        slack: extra forwards that a rank runs ahead per stage that follows it, in segments.
        group: micro-batches per group; None: the fewest that have P segments.

    Raises:
        ScheduleError: there are no virtual stages, the group is too small or larger than the number of micro-batches,
            the last group would have fewer than P segments, or the slack is negative.
    """
    if pipeline.virtual == 1:
        raise ScheduleError("interleaving needs at least 2 virtual stages per rank: use one_f_one_b()")
    group = _smallest_group(pipeline) if group is None else group
    _check_group(pipeline, group)
    orders = []
    for rank in range(pipeline.stages):
        after = pipeline.stages - rank - 1
        ahead = 2 * after + (pipeline.virtual - 1) * group * pipeline.segments + pipeline.segments - 1
        orders.append(_alternate(pipeline, ahead + _extra(slack, after), group))
    return Schedule(_name(pipeline, "1F1B-I", slack), pipeline, tuple(orders))


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
        Action(Kind.FORWARD, microbatch, segment, vstage)
        for first in range(0, pipeline.microbatches, group)
        for vstage in range(pipeline.virtual)
        for microbatch in range(first, min(first + group, pipeline.microbatches))
        for segment in range(pipeline.segments)
    ]


def _backwards(pipeline: Pipeline, group: int) -> list[Action]:
    return [
        Action(Kind.BACKWARD, microbatch, segment, vstage)
        for first in range(0, pipeline.microbatches, group)
        for vstage in reversed(range(pipeline.virtual))
        for microbatch in range(first, min(first + group, pipeline.microbatches))
        for segment in reversed(range(pipeline.segments))
    ]


def _extra(slack: int, after: int) -> int:
    if slack < 0:
        raise ScheduleError(f"slack is a number of segments from 0, not {slack}")
    return slack * after


def _smallest_group(pipeline: Pipeline) -> int:
    return -(-pipeline.stages // pipeline.segments)


def _check_group(pipeline: Pipeline, group: int) -> None:
    """Refuse a group that upstream's rules, read in segments, forbid."""
    stages, segments, microbatches = pipeline.stages, pipeline.segments, pipeline.microbatches
    if group < _smallest_group(pipeline):
        raise ScheduleError(
            f"a group of {group} micro-batches has {group * segments} segments, fewer than the {stages} pipeline "
            f"stages: use at least {_smallest_group(pipeline)} micro-batches per group"
        )
    if microbatches < group:
        raise ScheduleError(
            f"a group of {group} micro-batches ({segments} segments each, {stages} pipeline stages) does not fit into "
            f"{microbatches} micro-batches: use at least {group} micro-batches per step"
        )
    left = microbatches % group
    if 0 < left * segments < stages:
        least = _smallest_group(pipeline)
        good = [number for number in (microbatches - left, microbatches - left + least) if number >= group]
        raise ScheduleError(
            f"{microbatches} micro-batches in groups of {group} leave a last group of {left * segments} segments, "
            f"fewer than the {stages} pipeline stages: use {' or '.join(map(str, good))} micro-batches per step"
        )


def _name(pipeline: Pipeline, name: str, slack: int) -> str:
    return ("Seq" if pipeline.segments > 1 else "") + name + (f", slack {slack}" if slack else "")
