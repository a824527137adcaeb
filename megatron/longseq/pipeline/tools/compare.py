"""Schedules of one model side by side: bubble, step time and memory; and a measured step against its simulation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import median

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.memory import Recompute, head_bytes, peak_bytes, stage_bytes
from megatron.longseq.pipeline.plan.partition import Partition, paper_partition, parse
from megatron.longseq.pipeline.plan.schedule import ActionKind, Pipeline, Schedule
from megatron.longseq.pipeline.plan.segment_cost import CostModel, Sample, segment_costs
from megatron.longseq.pipeline.plan.simulate import Costs, Table, Timeline, simulate
from megatron.longseq.pipeline.plan.validate import prove


@dataclass(frozen=True, slots=True)
class ScheduleChoice:
    """What a user chooses.

    Attributes:
        segments: segments per sequence K.
        partition: "even", "balanced", lengths "N1,N2,...", or "paper" for the authors' own.
        virtual: virtual stages per rank V.
        slack: extra forwards per stage that follows, in segments.
        zero_bubble: weight gradients as actions of their own.
    """

    segments: int = 1
    partition: str = "even"
    virtual: int = 1
    slack: int = 0
    zero_bubble: bool = False

    def __str__(self) -> str:
        name = ("Seq" if self.segments > 1 else "") + "1F1B" + (f"-I V={self.virtual}" if self.virtual > 1 else "")
        split = f"K={self.segments} {self.partition}" if self.segments > 1 else ""
        slack = f"slack {self.slack}" if self.slack else ""
        return ", ".join(part for part in (name, split, slack, "zero-bubble" if self.zero_bubble else "") if part)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where it runs.

    Attributes:
        stages: pipeline-parallel size P.
        microbatches: micro-batches per step M.
        multiple: every segment's length is a multiple of it: the tensor-parallel size under sequence parallelism.
        latency: seconds of a message between stages.
        recompute: activations that backward computes again.
    """

    stages: int
    microbatches: int
    multiple: int = 1
    latency: float = 0.0
    recompute: Recompute = field(default_factory=Recompute)


@dataclass(frozen=True, slots=True)
class Result:
    """What the simulator says of a choice.

    Attributes:
        choice: the choices.
        partition: the segments.
        timeline: when every action would run.
        sequences: activations alive on the fullest rank at its worst moment, in units of one sequence's activations of
            one rank's layers. A segment counts from its forward to its backward; where weight gradients are actions of
            their own, to that action (then it is an upper bound: attention's part is free before).
        bytes_kept: bytes kept for backward on the fullest rank, in bf16 (see `plan.memory`).
        floor: the bubble that no order can remove, because the last stage has the head on top: 1 - mean / slowest rank.
    """

    choice: ScheduleChoice
    partition: Partition
    timeline: Timeline
    sequences: float
    bytes_kept: float
    floor: float


def run(choice: ScheduleChoice, model: CostModel, cluster: Cluster) -> Result:
    """Simulate one choice.

    Raises:
        ValueError: the sequence or the layers cannot be cut so, or there is no such schedule (ScheduleError).
    """
    if choice.partition == "paper":
        partition = paper_partition(model.shape, choice.segments, cluster.multiple)
    else:
        partition = parse(choice.partition, model, choice.segments, multiple=cluster.multiple)
    pipeline = Pipeline(cluster.stages, cluster.microbatches, choice.segments, choice.virtual)
    costs = segment_costs(model, partition.lengths, cluster.stages, choice.virtual)
    schedule = make(pipeline, slack=choice.slack, zero_bubble=choice.zero_bubble, costs=costs)
    timeline = replace(simulate(schedule, costs, cluster.latency), name=str(choice))
    busy = [sum(span.end - span.start for span in spans) for spans in timeline.spans]
    floor = 1 - sum(busy) / len(busy) / max(busy)
    sequences = max(prove(schedule).peak_live(partition.lengths))
    return Result(choice, partition, timeline, sequences, _kept(schedule, model, cluster, partition), floor)


def _kept(schedule: Schedule, model: CostModel, cluster: Cluster, partition: Partition) -> float:
    depth, in_segments = schedule.pipeline.depth, schedule.pipeline.segments > 1
    layers = model.shape.num_layers // depth
    stage = stage_bytes(model.shape, layers, cluster.recompute, in_segments=in_segments)
    return max(peak_bytes(schedule, partition.lengths, [stage] * depth, head_bytes(model.shape)))


def usual(choice: ScheduleChoice) -> list[ScheduleChoice]:
    """Return the choices that `compare` shows: upstream's, the paper's and ours, up to the given one and beyond it."""
    segments, slack = max(choice.segments, 2), max(choice.slack, 1)
    ours = ScheduleChoice(segments, "balanced")
    choices = [ScheduleChoice(), ScheduleChoice(segments), ScheduleChoice(segments, "paper"), ours]
    choices += [replace(ours, slack=slack), replace(ours, zero_bubble=True)]
    choices += [replace(ours, slack=slack, zero_bubble=True)]
    if choice.virtual > 1:
        choices += [ScheduleChoice(virtual=choice.virtual), replace(ours, virtual=choice.virtual)]
    return choices if choice in choices else [*choices, choice]


def attempt(choices: Iterable[ScheduleChoice], model: CostModel, cluster: Cluster) -> list[Result | str]:
    """Simulate each choice; where there is no such schedule or cut, its place holds the reason."""
    results: list[Result | str] = []
    for choice in choices:
        try:
            results.append(run(choice, model, cluster))
        except ValueError as error:
            results.append(f"{choice}: {error}")
    return results


def table(results: Sequence[Result | str]) -> str:
    """Return a markdown table; throughput and bytes kept for backward are relative to the first choice's.

    Reasons of the impossible follow below.
    """
    done = [result for result in results if isinstance(result, Result)]
    lines = [
        "| schedule | bubble | step (s) | throughput | sequences | segments (tokens) | bytes kept |",
        "|---|--:|--:|--:|--:|---|--:|",
    ]
    for result in done:
        timeline = result.timeline
        cells = [
            str(result.choice),
            f"{timeline.bubble:.1%}",
            f"{timeline.makespan:.4g}",
            f"{done[0].timeline.makespan / timeline.makespan:.3f}x",
            f"{result.sequences:.2f}",
            ", ".join(map(str, result.partition.lengths)),
            f"{result.bytes_kept / done[0].bytes_kept:.2f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if done and done[0].floor >= 0.0005:
        why = "because the slowest rank has more to compute than the mean (the last has the head)"
        lines += ["", f"Of every bubble, {done[0].floor:.1%} is there {why}: no order of actions removes it."]
    return "\n".join([*lines, *(f"Not possible: {result}" for result in results if isinstance(result, str))])


def replay(measured: Timeline) -> Timeline:
    """Return what the simulator predicts for a measured step: its own orders, each action at the median it took.

    Raises:
        ScheduleError: the measured orders are no schedule (a rank's file is of another step, say).
    """
    orders = tuple(tuple(span.action for span in spans) for spans in measured.spans)
    schedule = Schedule(measured.name, measured.pipeline, orders)
    name = f"{measured.name}, simulated at the measured medians"
    return replace(simulate(schedule, measured_costs(measured)), name=name)


def measured_costs(measured: Timeline) -> Costs:
    """Return the median seconds over the micro-batches, per stage, segment and kind."""
    pipeline = measured.pipeline
    took: dict[tuple[ActionKind, int, int], list[float]] = {}
    for rank, spans in enumerate(measured.spans):
        for span in spans:
            place = (span.action.kind, pipeline.stage(rank, span.action.vstage), span.action.segment)
            took.setdefault(place, []).append(span.end - span.start)

    def medians(kind: ActionKind) -> Table:
        stages, segments = range(pipeline.depth), range(pipeline.segments)
        return tuple(tuple(median(took.get((kind, stage, segment), [0.0])) for segment in segments) for stage in stages)

    return Costs(*(medians(kind) for kind in (ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT)))


def layer_samples(measured: Timeline, lengths: Sequence[int], layers: int) -> list[Sample]:
    """Return what one layer took per segment, for `cost.fit`: the mean over the stages that have layers alone.

    Args:
        measured: a step in segments.
        lengths: tokens per segment of that step.
        layers: layers per model stage.

    Raises:
        ValueError: lengths that are not the step's, or a number of layers below 1.
    """
    pipeline = measured.pipeline
    if len(lengths) != pipeline.segments or layers < 1:
        raise ValueError(
            f"{len(lengths)} lengths and {layers} layers per stage for a step of {pipeline.segments} segments: give "
            "one length per segment (the run printed them when it started) and the layers of a virtual stage"
        )
    costs = measured_costs(measured)
    plain = max(pipeline.depth - 1, 1)  # the last stage has the head
    ends = list(accumulate(lengths))

    def per_layer(segment: int, *tables: Table) -> float:
        return sum(table[stage][segment] for table in tables for stage in range(plain)) / plain / layers

    return [
        Sample(end - length, end, per_layer(i, costs.forward), per_layer(i, costs.backward, costs.weight))
        for i, (end, length) in enumerate(zip(ends, lengths, strict=True))
    ]
