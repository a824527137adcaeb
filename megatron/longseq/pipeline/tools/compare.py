"""Compare schedules of one model by bubble, step time and memory, and a measured step with its simulation."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import median

from megatron.longseq.command_line import markdown_table
from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.memory import (
    Recompute,
    chunk_bytes,
    deferred_head_bytes,
    head_bytes,
    peak_bytes,
    stage_bytes,
)
from megatron.longseq.pipeline.plan.partition import Partition, check_length, imbalance_of, parse
from megatron.longseq.pipeline.plan.schedule import ActionKind, Pipeline, Schedule
from megatron.longseq.pipeline.plan.segment_cost import CostModel, Line, ModelShape, Sample, cells, segment_costs
from megatron.longseq.pipeline.plan.simulate import Costs, Table, Timeline, simulate
from megatron.longseq.pipeline.plan.validate import prove


@dataclass(frozen=True, slots=True)
class ScheduleChoice:
    """The choices that determine a schedule.

    Attributes:
        segments, virtual: see `Pipeline`.
        partition: "even", "balanced", lengths "N1,N2,...", or "paper" for that of the paper's authors.
        slack, zero_bubble: see `generators.make`.
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
class PipelineSetup:
    """The resources of a run.

    Attributes:
        stages: pipeline-parallel size, P.
        microbatches: micro-batches per step, M.
        multiple: divides every segment's length: the tensor-parallel size under sequence parallelism.
        latency: seconds that a message between stages takes.
        recompute: which activations backward recomputes.
        chunk_tokens: tokens of a chunk of the cross entropy (--cross-entropy-chunk-tokens); None: whole logits.
    """

    stages: int
    microbatches: int
    multiple: int = 1
    latency: float = 0.0
    recompute: Recompute = field(default_factory=Recompute)
    chunk_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The simulation of one schedule.

    Attributes:
        choice: the choices.
        partition: the segments.
        timeline: when every action would run.
        sequences: peak of the live activations on the fullest rank, in units of one sequence's activations in one
            rank's layers. A segment counts until its backward, or until its weight gradient if that is an action of its
            own (an upper bound, since attention's activations are freed before).
        bytes_kept: bytes kept for backward on the fullest rank, in bf16 (see `plan.memory`).
        floor: bubble that no order can remove because the last stage also has the head: 1 - mean / slowest rank.
    """

    choice: ScheduleChoice
    partition: Partition
    timeline: Timeline
    sequences: float
    bytes_kept: float
    floor: float


def run(choice: ScheduleChoice, model: CostModel, cluster: PipelineSetup) -> Result:
    """Simulate one schedule.

    Args:
        choice: schedule and partition.
        model: costs of a layer and of the head.
        cluster: sizes of the pipeline, and the latency of a message.

    Raises:
        ValueError: the sequence or the layers cannot be divided so, or there is no such schedule (ScheduleError).
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


def paper_partition(shape: ModelShape, segments: int, multiple: int = 1) -> Partition:
    """Return the partition of the paper's authors.

    They balance forward FLOPs only, cut from the end of the sequence, and round every length but the first down. Their
    model has a plain MLP, one key head per query head, three operations per softmax element, and counts the embedding
    and the head as matrix products of every stage.

    Args:
        shape: sizes of the model.
        segments: segments per sequence, K.
        multiple: every length must be a multiple of it.

    Raises:
        ValueError: the sequence is not a multiple of `multiple`, or too short for so many segments.
    """
    heads, hidden, total = shape.num_attention_heads, shape.hidden_size, shape.seq_length
    check_length(total, segments, multiple)
    cell = shape.num_layers * heads * (4 * shape.channels + 3)
    token = shape.num_layers * (8 * hidden * heads * shape.channels + 4 * hidden * shape.ffn)
    token += 4 * hidden * shape.padded_vocab_size
    share = (cell * total**2 / 2 + token * total) / segments
    lengths: list[int] = []
    for _ in range(segments - 1):
        end = total - sum(lengths)
        slope = token + cell * end  # share = slope * length - cell * length^2 / 2: the smaller root
        length = int((slope - math.sqrt(slope**2 - 2 * cell * share)) / cell) // multiple * multiple
        lengths.insert(0, length)
    lengths.insert(0, total - sum(lengths))
    forward = Line(cell, token)
    return Partition("paper", tuple(lengths), multiple, imbalance_of(lengths, lambda a, b: forward(cells(a, b), b - a)))


def _kept(schedule: Schedule, model: CostModel, cluster: PipelineSetup, partition: Partition) -> float:
    depth, in_segments = schedule.pipeline.depth, schedule.pipeline.segments > 1
    layers = model.shape.num_layers // depth
    stage = stage_bytes(model.shape, layers, cluster.recompute, in_segments=in_segments)
    head, chunk = head_bytes(model.shape, chunked=cluster.chunk_tokens is not None), 0.0
    deferred = deferred_head_bytes(model.shape)
    if cluster.chunk_tokens is not None:
        chunk, deferred = chunk_bytes(model.shape, min(cluster.chunk_tokens, max(partition.lengths))), 0.0
    return max(peak_bytes(schedule, partition.lengths, [stage] * depth, head, chunk, deferred))


def usual(choice: ScheduleChoice) -> list[ScheduleChoice]:
    """Return the choices that `compare` shows by default, and the given one: upstream's, the paper's and ours."""
    segments, slack = max(choice.segments, 2), max(choice.slack, 1)
    ours = ScheduleChoice(segments, "balanced")
    choices = [ScheduleChoice(), ScheduleChoice(segments), ScheduleChoice(segments, "paper"), ours]
    choices += [replace(ours, slack=slack), replace(ours, zero_bubble=True)]
    choices += [replace(ours, slack=slack, zero_bubble=True)]
    if choice.virtual > 1:
        choices += [ScheduleChoice(virtual=choice.virtual), replace(ours, virtual=choice.virtual)]
    return choices if choice in choices else [*choices, choice]


def attempt(choices: Iterable[ScheduleChoice], model: CostModel, cluster: PipelineSetup) -> list[Result | str]:
    """Simulate each choice; the result of one without a schedule is the reason.

    Args:
        choices: schedules to simulate.
        model: cost of the model.
        cluster: sizes of the pipeline and its links.

    Returns:
        For each choice its result, or the reason why there is none.
    """
    results: list[Result | str] = []
    for choice in choices:
        try:
            results.append(run(choice, model, cluster))
        except ValueError as error:
            results.append(f"{choice}: {error}")
    return results


def table(results: Sequence[Result | str]) -> str:
    """Return a markdown table; throughput and bytes kept for backward are relative to the first choice.

    The reasons why choices have no schedule follow the table.
    """
    done = [result for result in results if isinstance(result, Result)]
    rows = [
        (
            str(result.choice),
            f"{result.timeline.bubble:.1%}",
            f"{result.timeline.makespan:.4g}",
            f"{done[0].timeline.makespan / result.timeline.makespan:.3f}x",
            f"{result.sequences:.2f}",
            ", ".join(map(str, result.partition.lengths)),
            f"{result.bytes_kept / done[0].bytes_kept:.2f}x",
        )
        for result in done
    ]
    head = ("schedule", "bubble", "step (s)", "throughput", "sequences", "segments (tokens)", "bytes kept")
    lines = [markdown_table(head, rows, "|---|--:|--:|--:|--:|---|--:|")]
    if done and done[0].floor >= 0.0005:
        why = "because the slowest rank has more to compute than the mean (the last has the head)"
        lines += ["", f"Of every bubble, {done[0].floor:.1%} is there {why}: no order of actions removes it."]
    return "\n".join([*lines, *(f"Not possible: {result}" for result in results if isinstance(result, str))])


def replay(measured: Timeline) -> Timeline:
    """Return the simulation of a measured step, with the same orders and the median time of each action.

    Raises:
        ScheduleError: the measured orders are not a schedule, for instance if a rank's file is of another step.
    """
    orders = tuple(tuple(span.action for span in spans) for spans in measured.spans)
    schedule = Schedule(measured.name, measured.pipeline, orders)
    name = f"{measured.name}, simulated at the measured medians"
    return replace(simulate(schedule, measured_costs(measured)), name=name)


def measured_costs(measured: Timeline) -> Costs:
    """Return the median seconds over micro-batches, by stage, segment and kind."""
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
    """Return the time of one layer per segment, for `segment_cost.fit`: the mean over all stages but the last.

    Args:
        measured: a measured step.
        lengths: tokens per segment of that step.
        layers: layers per model stage.

    Raises:
        ValueError: there is not one length per segment, or the number of layers is below 1.
    """
    pipeline = measured.pipeline
    if len(lengths) != pipeline.segments or layers < 1:
        raise ValueError(
            f"{len(lengths)} lengths and {layers} layers per stage for a step of {pipeline.segments} segments: give "
            "one length per segment (the run printed them) and the layers of a virtual stage"
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


def write_samples(file: Path, samples: Sequence[Sample]) -> None:
    """Write samples for `segment_cost.read_samples` as a JSON list, one sample per line."""
    rows = [json.dumps([s.begin, s.end, s.forward, s.backward]) for s in samples]
    file.write_text("[" + ",\n ".join(rows) + "]\n")
