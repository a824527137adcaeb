"""Predict a training step: its seconds and the bytes of every stage, with what they consist of."""

import functools
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from megatron.longseq.pipeline.plan.segment_cost import flops
from megatron.longseq.pipeline.plan.simulate import Costs, simulate
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.communication import (
    boundary_seconds,
    layer_messages,
)
from megatron.longseq.planner.plan.compute import (
    Seconds,
    fuses_softmax,
    head_seconds,
    layer_seconds,
    moved_seconds,
)
from megatron.longseq.planner.plan.configuration import Configuration, reasons
from megatron.longseq.planner.plan.data_parallel import (
    data_seconds,
    gathers_of_a_unit,
    step_optimizer_seconds,
    tied_seconds,
)
from megatron.longseq.planner.plan.memory import (
    recomputed_layers,
    schedule_of,
    stage_params,
    stages_bytes,
)
from megatron.longseq.planner.plan.model import Architecture

HOST_BACKWARD = 1.6  # a host's time for the kernels of a layer's backward, over that of its forward


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """What a step takes.

    Attributes:
        step_seconds: seconds of a step.
        tokens_per_second_per_gpu: tokens of all ranks per second and GPU.
        tflops_per_gpu: model TFLOP/s of a GPU, with causal attention counted once and without recomputation.
        mfu: share of the peak, causal attention counted once.
        mfu_full: share of the peak, all scores counted (PaLM, appendix B).
        stages: for every pipeline rank, bytes of each kind at its peak instant.
        peak_bytes: allocated bytes of the fullest rank.
        reserve_bytes: what the process needs beyond them: contexts, communicators, fragmentation.
        fits: whether both fit the GPU's memory.
        bubble_seconds: seconds in which the slowest stage waits for others.
        exposed: seconds of communication that nothing hides, by dimension: tensor, context, expert, pipeline, data.
        hidden: seconds of communication that run beside compute, by dimension.
        breakdown: seconds by kind; they sum to the step.
        reasons: why the run is not valid; empty if it is.
    """

    step_seconds: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float
    mfu_full: float
    stages: tuple[dict[str, float], ...]
    peak_bytes: float
    reserve_bytes: float
    fits: bool
    bubble_seconds: float
    exposed: dict[str, float]
    hidden: dict[str, float]
    breakdown: dict[str, float]
    reasons: tuple[str, ...] = field(default=())


class StageSeconds(NamedTuple):
    """Seconds of a micro-batch on a pipeline rank.

    Attributes:
        forward, backward: of all layers and the head, with recomputation and exposed communication.
        weight: the part of `backward` that zero bubble may delay.
        again: the part of `backward` that is recomputation, without its communication.
        tensor, context, expert: exposed communication in both.
        hidden: communication beside compute.
    """

    forward: float
    backward: float
    weight: float
    again: float
    tensor: float
    context: float
    expert: float
    hidden: float

    @property
    def both(self) -> float:
        """Seconds of forward and backward."""
        return self.forward + self.backward


@functools.lru_cache(maxsize=65536)
def _layer(model: Architecture, cluster: Cluster, run: Configuration, has_experts: bool, share: float) -> StageSeconds:
    """Return one layer as if it were a stage; a `share` of such layers is recomputed as a whole."""
    seconds = layer_seconds(model, cluster, run, has_experts)
    messages = layer_messages(model, cluster, run, has_experts, seconds)
    host = cluster.layer_seconds * (1.0 if fuses_softmax(model, run) else 1.5)
    sent = messages.forward + messages.context_forward + messages.expert_forward
    forward = max(seconds.forward + sent, host)
    backward = seconds.backward + messages.backward + messages.context_backward + messages.expert_backward
    backward = max(backward, HOST_BACKWARD * host)
    again = share * (forward - sent)
    if run.recompute_granularity == "selective":
        again = _recomputed_seconds(model, cluster, run, seconds)
    return StageSeconds(
        forward,
        backward + again + share * sent,
        seconds.weight,
        again,
        messages.backward + (1 + share) * messages.forward,
        messages.context_backward + (1 + share) * messages.context_forward,
        messages.expert_backward + (1 + share) * messages.expert_forward,
        messages.hidden,
    )


def _recomputed_seconds(model: Architecture, cluster: Cluster, run: Configuration, seconds: Seconds) -> float:
    """Return the seconds of recomputing the modules of --recompute-modules."""
    modules = set(run.recompute_modules or ("core_attn",))
    again = seconds.attention if "core_attn" in modules else 0.0
    if modules & {"mlp", "moe", "shared_experts"}:
        again += 0.6 * (seconds.forward - seconds.attention)
    if modules & {"mla_up_proj"}:
        again += 0.15 * (seconds.forward - seconds.attention)
    if modules & {"layernorm", "moe_act"}:
        tokens = run.micro_batch_size * run.seq_length / run.context_parallel_size / run.tensor_model_parallel_size
        again += moved_seconds(cluster, 8.0 * tokens * model.hidden_size)
    return again


def _scale(one: StageSeconds, count: float) -> StageSeconds:
    return StageSeconds(*(count * value for value in one))


def _sum(one: StageSeconds, two: StageSeconds) -> StageSeconds:
    return StageSeconds(*(left + right for left, right in zip(one, two, strict=True)))


@functools.lru_cache(maxsize=65536)
def stage_seconds(model: Architecture, cluster: Cluster, run: Configuration) -> tuple[StageSeconds, ...]:
    """Return the seconds of a micro-batch on every pipeline rank."""
    layers = run.stage_layers(model.num_layers)
    found, first = [], 0
    for stage, count in enumerate(layers):
        with_experts = sum(model.has_experts(first + one) for one in range(count)) if model.num_experts else 0
        share = recomputed_layers(run, count) / max(1, count)
        total = _scale(_layer(model, cluster, run, False, share), count - with_experts)
        if with_experts:
            total = _sum(total, _scale(_layer(model, cluster, run, True, share), with_experts))
        if stage == len(layers) - 1:
            head = head_seconds(model, cluster, run)
            total = total._replace(
                forward=total.forward + head.forward,
                backward=total.backward + head.backward,
                weight=total.weight + head.weight,
            )
        found.append(total)
        first += count
    return tuple(found)


def stage_costs(model: Architecture, cluster: Cluster, run: Configuration) -> Costs:
    """Return the seconds of every model stage and segment for the pipeline's simulator; a rank's layers are equal."""
    parts = run.virtual_stages * run.seq1f1b_splits
    stages = stage_seconds(model, cluster, run) * run.virtual_stages
    tables = (
        [one.forward for one in stages],
        [one.backward - one.weight for one in stages],
        [one.weight for one in stages],
    )
    return Costs(*(tuple((seconds / parts,) * run.seq1f1b_splits for seconds in table) for table in tables))


class _FillCase(NamedTuple):
    """What the bubble of a schedule depends on; see `pipeline.plan.generators.make`.

    Attributes:
        weight_share: share of weight gradients in forward plus backward.
        growth: share of forward plus backward that grows with a segment's position; 0: segments cost the same.
    """

    stages: int
    microbatches: int
    segments: int
    virtual: int
    slack: int
    zero_bubble: bool
    weight_share: float
    growth: float


@functools.lru_cache(maxsize=4096)
def _simulated_fill(case: _FillCase) -> float:
    """Return the bubble of a schedule in units of a stage's forward plus backward, from the pipeline's simulator."""
    schedule = schedule_of(*case[:6])
    pipeline, count = schedule.pipeline, case.segments
    unit = 1.0 / (count * case.virtual)
    # Of causal attention, segment i of K has (2i + 1) / K^2 of the whole.
    costs = [unit * (1 - case.growth + case.growth * (2 * index + 1) / count) for index in range(count)]
    shares = (1 / 3, 2 / 3 - case.weight_share, case.weight_share)
    rows = [(tuple(share * cost for cost in costs),) * pipeline.depth for share in shares]
    return simulate(schedule, Costs(*rows)).makespan - pipeline.microbatches


def _bubble(
    model: Architecture, cluster: Cluster, run: Configuration, seconds: tuple[StageSeconds, ...], *, least: bool
) -> float:
    """Return the seconds in which the slowest stage waits for the other stages to fill and to drain.

    With segments of equal cost, and gradients of weights within the backward, the wait takes (P - 1) / (V * K) of a
    stage's forward and backward, whatever the slack. Other schedules are simulated, unless the least wait is wanted:
    segments of unequal cost wait no less than equal ones, and zero bubble waits as `generators.zb_h1` says or longer.
    """
    stages, segments = run.pipeline_model_parallel_size, run.seq1f1b_splits
    if stages == 1:
        return 0.0
    slowest = max(seconds, key=lambda one: one.both)
    others = sum(one.both for one in seconds) - slowest.both
    is_even = segments > 1 and run.seq1f1b_partition == "even"
    if not run.zero_bubble and (least or not is_even):
        return others / (run.virtual_stages * segments)
    weight = round(slowest.weight / slowest.both, 1) if run.zero_bubble else 0.0
    if least:
        forward, inputs, slack = 1 / 3, 2 / 3 - weight, run.seq1f1b_slack
        return max(forward, inputs - slack * forward, 1 - (2 + slack) * weight) / segments * others
    layer = layer_seconds(model, cluster, run, False)
    growth = round(layer.attention / layer.forward, 1) if is_even else 0.0
    case = _FillCase(
        stages, run.microbatches, segments, run.virtual_stages, run.seq1f1b_slack, run.zero_bubble, weight, growth
    )
    return _simulated_fill(case) * others / (stages - 1)


def visible_cells(model: Architecture, length: int) -> float:
    """Return the (query, key) pairs that attention computes for `length` tokens, as FLOP counts define them."""
    cells = length * length / 2
    return min(cells, length * model.window_size) if model.window_size else cells


def model_flops(model: Architecture, tokens: float, cells: float) -> tuple[float, float]:
    """Return the FLOPs of a step with causal attention counted once, and the part of attention.

    Args:
        model: its architecture.
        tokens: tokens of the step.
        cells: `visible_cells` of all its sequences.
    """
    attention = 3.0 * flops(model.shape(1)).layer.forward.cell * cells * model.num_layers
    products = 0.0
    for layer in range(model.num_layers) if model.num_experts else (0,):
        dense, expert = model.layer_params(layer)
        used = dense + expert * model.moe_router_topk / max(1, model.num_experts)
        products += used * (1 if model.num_experts else model.num_layers)
    products += model.padded(1) * model.hidden_size
    return 6.0 * products * tokens + attention, attention


def price(
    model: Architecture, cluster: Cluster, run: Configuration
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Return the seconds of a step, without the memory that it needs.

    Returns:
        Seconds of the step, its exposed parts by name, and the seconds of hidden communication by name.
    """
    seconds = stage_seconds(model, cluster, run)
    breakdown = pipeline_price(model, cluster, run)
    params = stage_params(model, run)
    gathers = gathers_of_a_unit(model.num_layers, run)
    data = [
        data_seconds(cluster, run, one, stage.forward, stage.backward, gathers)
        for one, stage in zip(_ends(params), _ends(seconds), strict=True)
    ]
    exposed = max(data, key=lambda one: one.exposed)
    breakdown["data"] = exposed.exposed + tied_seconds(model, cluster, run)
    breakdown["optimizer"] = max(step_optimizer_seconds(cluster, run, one) for one in _ends(params))
    slowest = max(seconds, key=lambda one: one.both)
    hidden = {"tensor": run.microbatches * slowest.hidden, "data": exposed.hidden, "pipeline": 0.0}
    return sum(breakdown.values()), breakdown, hidden


def pipeline_price(
    model: Architecture, cluster: Cluster, run: Configuration, *, least: bool = False
) -> dict[str, float]:
    """Return what the seconds of a step consist of, with 0 for data parallelism and the optimizer.

    Args:
        model, cluster, run: see `predict`.
        least: whether a lower bound of the bubble is enough, which takes no simulation.
    """
    seconds = stage_seconds(model, cluster, run)
    count = run.microbatches
    slowest = max(seconds, key=lambda one: one.both)
    boundary = boundary_seconds(model, cluster, run)
    stages, virtual, splits = run.pipeline_model_parallel_size, run.virtual_stages, run.seq1f1b_splits
    overlaps = virtual > 1 and run.overlap_p2p_comm
    messages = 2.0 * (stages - 1) * boundary
    if stages > 1:
        messages += 2.0 * count * virtual * splits * boundary * (0.1 if overlaps or splits > 1 else 1.0)
    stragglers = 1.0 + cluster.imbalance * math.log2(max(1, run.gpus))
    exchanged = slowest.tensor + slowest.context + slowest.expert
    return {
        "compute": count * (slowest.both - slowest.again - exchanged) * stragglers,
        "recomputation": count * slowest.again * stragglers,
        "tensor": count * slowest.tensor,
        "context": count * slowest.context,
        "expert": count * slowest.expert,
        "pipeline": messages,
        "bubble": _bubble(model, cluster, run, seconds, least=least),
        "data": 0.0,
        "optimizer": 0.0,
        "host": cluster.step_seconds,
    }


def _ends[Item](items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Return the first, a middle and the last of some stages: the others are like the middle one."""
    return items if len(items) <= 3 else (items[0], items[1], items[-1])


def predict(model: Architecture, cluster: Cluster, run: Configuration) -> StepPrediction:
    """Return the prediction of a step.

    Args:
        model: its architecture.
        cluster: the GPUs; their number is that of the run.
        run: the configuration. An invalid one is priced too, with the reasons.

    Raises:
        ValueError: the sizes allow no prediction at all.
    """
    why = reasons(model, run)
    if run.smallest < 1 or run.data_parallel_size < 1 or min(run.stage_layers(model.num_layers)) < 0:
        raise ValueError("; ".join(why))
    if cluster.gpus != run.gpus:
        cluster = replace(cluster, gpus=run.gpus)
    _, breakdown, hidden = price(model, cluster, run)
    cells = run.global_batch_size * visible_cells(model, run.seq_length)
    stages = stages_bytes(model, run, cluster)
    found = step_prediction(model, cluster, run, breakdown, hidden, stages, run.tokens_per_step, cells)
    return replace(found, reasons=tuple(why))


def step_prediction(
    model: Architecture,
    cluster: Cluster,
    run: Configuration,
    breakdown: dict[str, float],
    hidden: dict[str, float],
    stages: tuple[dict[str, float], ...],
    tokens: float,
    cells: float,
) -> StepPrediction:
    """Return the prediction of a step with the figures that follow from its time and memory.

    Args:
        model, cluster, run: what is predicted.
        breakdown: seconds of a step by kind.
        hidden: seconds of communication that computation hides, by kind.
        stages: bytes of a rank of every pipeline stage, by kind.
        tokens: tokens of a step.
        cells: pairs of a query and a key that attention sees in a step.
    """
    seconds, peak = sum(breakdown.values()), max(sum(kinds.values()) for kinds in stages)
    reserve = cluster.reserve_bytes(peak)
    work, attention = model_flops(model, tokens, cells)
    rate = work / seconds / run.gpus / 1e12
    exposed = ("tensor", "context", "expert", "pipeline", "data")
    return StepPrediction(
        step_seconds=seconds,
        tokens_per_second_per_gpu=tokens / seconds / run.gpus,
        tflops_per_gpu=rate,
        mfu=rate / cluster.peak_tflops,
        mfu_full=rate * (1 + attention / work) / cluster.peak_tflops,
        stages=stages,
        peak_bytes=peak,
        reserve_bytes=reserve,
        fits=peak + reserve <= cluster.memory_bytes,
        bubble_seconds=breakdown["bubble"],
        exposed={name: breakdown[name] for name in exposed if name in breakdown},
        hidden=hidden,
        breakdown=breakdown,
    )
