"""Seconds of data parallelism and of the optimizer at the end of a step."""

import functools
from itertools import pairwise
from typing import NamedTuple

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.schedule import ActionKind, Pipeline
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.communication import data_links, group, ring_seconds
from megatron.longseq.planner.plan.compute import moved_seconds, optimizer_seconds
from megatron.longseq.planner.plan.configuration import Configuration
from megatron.longseq.planner.plan.memory import StageParams, sharding_groups, widths
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.gather_window import gather_count
from megatron.longseq.sharding.plan.memory import Model
from megatron.longseq.sharding.plan.strategy import Level, Strategy
from megatron.longseq.sharding.plan.time_model import ComputeTime, StepSeconds, TrainingJob
from megatron.longseq.sharding.plan.time_model import predict as predict_sharding


class DataSeconds(NamedTuple):
    """Seconds of data parallelism in a step.

    Attributes:
        exposed: those that lengthen the step.
        hidden: those beside compute.
    """

    exposed: float
    hidden: float


def gathers_of_a_unit(layers: int, run: Configuration) -> float:
    """Return how often sharded parameters of a layer are gathered in a micro-batch or segment, on average.

    Selective overlap keeps layers where a backward follows a forward or the other way round, which is rarest on the
    first stage.

    Args:
        layers: of the model.
        run: its configuration.
    """
    if not run.paro_selective_overlap:
        return 2.0
    pipeline = Pipeline(
        run.pipeline_model_parallel_size, run.microbatches, max(1, run.seq1f1b_splits), run.virtual_stages
    )
    order = make(pipeline, slack=run.seq1f1b_slack, zero_bubble=run.zero_bubble).orders[0]
    passes = [action.kind for action in order if action.vstage == 0 and action.kind is not ActionKind.WEIGHT]
    turns = sum(one is not following for one, following in pairwise(passes))
    units = max(1, layers // (run.pipeline_model_parallel_size * run.virtual_stages))
    return 2.0 * gather_count(units, run.paro_prefetch_units, len(passes), turns) / (units * len(passes))


def data_seconds(
    cluster: Cluster, run: Configuration, params: StageParams, forward: float, backward: float, gathers: float = 2.0
) -> DataSeconds:
    """Return the exposed and hidden seconds of reducing gradients and gathering parameters, on one pipeline rank.

    Args:
        cluster: the GPUs.
        run: its configuration.
        params: parameters of the pipeline rank.
        forward, backward: seconds of a micro-batch on that rank.
        gathers: all-gathers of a unit's parameters in a micro-batch, see `gathers_of_a_unit`.
    """
    ranks = run.data_parallel_size * run.context_parallel_size
    exposed = hidden = 0.0
    if ranks > 1 and params.dense:
        stride = run.tensor_model_parallel_size
        one = _sharding(cluster, run, params.dense, ranks, stride, forward, backward, gathers)
        exposed, hidden = one
    tensor = run.expert_tensor_parallel_size or run.tensor_model_parallel_size
    experts = ranks * run.tensor_model_parallel_size // (run.expert_model_parallel_size * tensor)
    if experts > 1 and params.expert:
        stride = tensor * run.expert_model_parallel_size
        one = _sharding(cluster, run, params.expert, experts, stride, forward, backward, gathers)
        exposed, hidden = exposed + one.exposed, hidden + one.hidden
    return DataSeconds(exposed, hidden)


@functools.lru_cache(maxsize=65536)
def _collective_seconds(strategy: Strategy, job: TrainingJob) -> StepSeconds:
    """Return the seconds of the collectives of sharded model states."""
    return predict_sharding(strategy, job).seconds


def _sharding(
    cluster: Cluster,
    run: Configuration,
    params: int,
    ranks: int,
    stride: int,
    forward: float,
    backward: float,
    gathers: float,
) -> DataSeconds:
    strategy = run.strategy
    groups = sharding_groups(run, max(1, cluster.gpus_per_node * run.tensor_model_parallel_size // stride), ranks)
    mode = CollectivesMode(run.paro_collectives) if run.paro else CollectivesMode.FLAT
    job = TrainingJob(
        groups,
        Model(params, params),
        ComputeTime(run.microbatches),
        data_links(cluster, stride),
        widths(run),
        mode,
        gathers=gathers,
    )
    spent = _collective_seconds(strategy, job)
    repeated = run.seq1f1b_splits * spent.params + spent.grads  # parameters are gathered for every segment
    overlapped = strategy.params > Level.NONE or strategy.grads > Level.NONE
    room = run.microbatches * (forward + backward) if overlapped else 0.0
    hidden = 0.9 * min(repeated, room)
    grads = min(spent.finish_grads, backward) if run.overlap_grad_reduce else 0.0
    gathers = min(spent.finish_params, forward) if run.overlap_param_gather else 0.0
    hidden += 0.9 * (grads + gathers)
    return DataSeconds(repeated + spent.finish_grads + spent.finish_params - hidden, hidden)


def step_optimizer_seconds(cluster: Cluster, run: Configuration, params: StageParams) -> float:
    """Return the seconds of the optimizer's step on a rank.

    Args:
        cluster: the GPUs.
        run: its configuration.
        params: parameters of the pipeline rank.
    """
    groups = sharding_groups(run, cluster.gpus_per_node)
    count = (params.dense + params.expert) / groups.shards(run.strategy.optimizer)
    gradients = moved_seconds(cluster, 8.0 * (params.dense + params.expert))  # zeroing and scaling the buffer
    offloaded = run.optimizer_offload_fraction * count if run.optimizer_cpu_offload else 0.0
    return optimizer_seconds(cluster, count - offloaded) + gradients + _host_seconds(cluster, run, offloaded)


def _host_seconds(cluster: Cluster, run: Configuration, count: float) -> float:
    """Return the seconds in which the host updates `count` parameters of a rank.

    Float32 gradients come from the GPU, and float32 parameters go back. PyTorch's fused Adam reads a gradient, the
    parameter and two moments, and writes the last three: 28 bytes.
    """
    sent = 4.0 * count / cluster.pcie_bandwidth
    update = 28.0 * count / cluster.host_bandwidth
    return max(sent, update) if run.overlap_cpu_optimizer_d2h_h2d else 2 * sent + update


def tied_seconds(model: Architecture, cluster: Cluster, run: Configuration) -> float:
    """Return the seconds of summing the gradients of a tied embedding between the first and the last stage."""
    if run.pipeline_model_parallel_size == 1 or model.untie_embeddings_and_output_weights:
        return 0.0
    size = model.padded(run.tensor_model_parallel_size) / run.tensor_model_parallel_size * model.hidden_size
    ranks = group(cluster, 2, run.gpus // run.pipeline_model_parallel_size)
    return 2.0 * ring_seconds(cluster, ranks, size * widths(run).grad)
