"""Bytes of every pipeline stage at its peak instant, by kind."""

import functools
import math
from typing import NamedTuple

from megatron.longseq.pipeline.plan.generators import make, smallest_group
from megatron.longseq.pipeline.plan.memory import StageBytes, peak_bytes
from megatron.longseq.pipeline.plan.schedule import Pipeline, Schedule
from megatron.longseq.planner.plan.activations import (
    LayerBytes,
    deferred_head_bytes,
    full_layer_bytes,
    layer_bytes,
    loss_bytes,
    packed_backward_bytes,
    scores_buffer_bytes,
    weight_grad_bytes,
)
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.configuration import Configuration
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.sharding.plan.memory import Model, Widths, memory
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Level

_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


class StageParams(NamedTuple):
    """Parameters of a pipeline rank.

    Attributes:
        dense: shared by the data-parallel and context-parallel ranks.
        expert: of experts, shared by fewer of them.
        embedding, head: the parts of `dense` in the embedding and in the output layer.
    """

    dense: int
    expert: int
    embedding: int = 0
    head: int = 0


@functools.lru_cache(maxsize=65536)
def stage_params(model: Architecture, run: Configuration) -> tuple[StageParams, ...]:
    """Return the parameters of every pipeline rank. A tied output layer on another stage is a copy.

    Returns:
        One entry per pipeline rank: the parameters of one of its tensor-parallel ranks.
    """
    tensor, expert = run.tensor_model_parallel_size, run.expert_model_parallel_size
    expert_tensor = run.expert_tensor_parallel_size or tensor
    stages = run.pipeline_model_parallel_size
    found, first = [], 0
    for stage, count in enumerate(run.stage_layers(model.num_layers)):
        if model.num_experts:
            layers = [model.layer_params(first + one, tensor, expert, expert_tensor) for one in range(count)]
            dense, experts = sum(one.dense for one in layers), sum(one.expert for one in layers)
        else:
            dense, experts = count * model.layer_params(0, tensor).dense, 0
        embedding = model.embedding_params(tensor, run.seq_length) if stage == 0 else 0
        head = 0
        if stage == stages - 1:
            head = model.head_params(tensor)
            if stages == 1 and not model.untie_embeddings_and_output_weights:
                head -= model.padded(tensor) // tensor * model.hidden_size
        found.append(StageParams(dense + embedding + head, experts, embedding, head))
        first += count
    return tuple(found)


def widths(run: Configuration) -> Widths:
    """Return the bytes of an element of parameters, gradients and optimizer states, as upstream allocates them."""
    if not (run.bf16 or run.fp16):
        return Widths(param=4, grad=4, optimizer=8, grad_wire=4)
    param = 2  # with --fp8-param-gather a weight and its transpose, in fp8
    is_wide = run.accumulate_allreduce_grads_in_fp32 and not run.grad_reduce_in_bf16
    grad = 4 if is_wide or (run.paro and run.bf16) else 2  # under --paro, bf16 gradients accumulate in fp32
    optimizer = 12
    if run.use_precision_aware_optimizer:
        optimizer = sum(_WIDTHS[one] for one in (run.main_params_dtype, run.exp_avg_dtype, run.exp_avg_sq_dtype))
        grad = min(grad, _WIDTHS[run.main_grads_dtype])
    if run.optimizer_cpu_offload:
        optimizer = round(optimizer * (1 - run.optimizer_offload_fraction))
    return Widths(param=param, grad=grad, optimizer=optimizer, grad_wire=2 if run.grad_reduce_in_bf16 else grad)


def sharding_groups(run: Configuration, per_node: int, ranks: int | None = None) -> RankGroups:
    """Return the data-parallel times context-parallel ranks in groups: of --paro-group-size, of an instance, of a node.

    Args:
        run: the configuration.
        per_node: GPUs of a node.
        ranks: number of ranks; None: all that share dense parameters.
    """
    count = ranks or run.data_parallel_size * run.context_parallel_size
    if run.paro_group_size:
        size = run.paro_group_size
    elif run.num_distributed_optimizer_instances > 1:
        size = count // run.num_distributed_optimizer_instances
    else:
        size = max(1, per_node // run.tensor_model_parallel_size)
    size = max(1, min(size, count))
    while count % size:
        size -= 1
    return RankGroups(count, size)


@functools.lru_cache(maxsize=65536)
def _state_bytes(
    model: Architecture, run: Configuration, cluster: Cluster, params: StageParams
) -> tuple[tuple[str, float], ...]:
    return tuple(state_bytes(model, run, cluster, params).items())


def state_bytes(model: Architecture, run: Configuration, cluster: Cluster, params: StageParams) -> dict[str, float]:
    """Return the bytes of parameters, gradients and optimizer states of a rank, with gathered buffers of shards.

    Args:
        model: its architecture.
        run: its configuration.
        cluster: the GPUs.
        params: parameters of the pipeline rank.

    Returns:
        Bytes by kind: "parameters", "gradients", "optimizer" and "gathered".
    """
    found = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0, "gathered": 0.0}
    per_element = widths(run)
    expert_ranks = run.data_parallel_size * run.context_parallel_size * run.tensor_model_parallel_size
    expert_ranks //= run.expert_model_parallel_size * (
        run.expert_tensor_parallel_size or run.tensor_model_parallel_size
    )
    for count, ranks in ((params.dense, None), (params.expert, max(1, expert_ranks))):
        if not count:
            continue
        groups = sharding_groups(run, cluster.gpus_per_node, ranks)
        part = memory(run.strategy, groups, Model(count, count), per_element)
        found["parameters"] += part.params
        found["gradients"] += part.grads
        if run.accumulate_allreduce_grads_in_fp32:
            found["gradients"] += cluster.gradient_copy_bytes * part.grads / per_element.grad
        found["optimizer"] += part.optimizer
    found["gathered"] = _gathered_bytes(model, run, params, per_element)
    return found


def _gathered_bytes(model: Architecture, run: Configuration, params: StageParams, per_element: Widths) -> float:
    """Return the bytes of the full buckets that a rank of sharded parameters or gradients holds at a time.

    PaRO's pool of buckets keeps what was in use at a time for each size, and embedding and output layer have another
    size than layers. Parameters: the layer that computes and those ahead; one of the others. Gradients: those that a
    layer's backward fills, and two buckets that are being reduced, which may be of the output layer and the embedding.
    If gradients are sent in another dtype than that of their sums, the buckets in flight are copies in that dtype, and
    so are two more for the sums of a step. Segments fill all buckets of a stage before they are reduced.

    PyTorch's and Megatron's FSDP hold two units of each.
    """
    tensor, expert = run.tensor_model_parallel_size, run.expert_model_parallel_size
    last = model.layer_params(model.num_layers - 1, tensor, expert, run.expert_tensor_parallel_size or tensor)
    layer = float(last.dense + last.expert)
    ends: tuple[int, ...] = params.embedding, params.head
    found, strategy = 0.0, run.strategy
    if not run.paro:
        elements = 2 * max(layer, *ends)
        found += elements * per_element.param if strategy.params > Level.NONE else 0.0
        return found + (elements * per_element.grad if strategy.grads > Level.NONE else 0.0)
    bucket, most = layer, float(params.dense + params.expert)
    if strategy.params > Level.NONE:
        ahead = run.paro_prefetch_units if run.paro_selective_overlap else 1
        found += min((1 + ahead) * layer + max(ends), most) * per_element.param
    else:  # a bucket ends with the layer after which it has this size
        ranks = run.data_parallel_size * run.context_parallel_size
        size = run.ddp_bucket_size or max(40_000_000, 1_000_000 * ranks)
        bucket = min(most, max(1, math.ceil(size / layer)) * layer)
        ends = tuple(end if end >= size else 0 for end in ends)
    is_wide = per_element.grad_wire == per_element.grad
    if not is_wide:
        found += 2 * bucket * per_element.grad_wire
    if strategy.grads > Level.NONE:
        in_flight = min(2 * bucket + sum(ends), most)
        filled = bucket if is_wide else bucket + max(ends)
        if run.seq1f1b_splits > 1:  # all buckets of a stage are filled until the last segment's backward
            filled = most
        found += min(filled, most - in_flight * is_wide) * per_element.grad + in_flight * per_element.grad_wire
    return found


def in_flight(run: Configuration, stage: int) -> float:
    """Return the micro-batches of a whole rank that are in flight at the peak; fractions count virtual stages.

    Args:
        run: its configuration.
        stage: pipeline rank, from 0.
    """
    stages, virtual, count = run.pipeline_model_parallel_size, run.virtual_stages, run.microbatches
    if stages == 1:
        return 1.0
    if virtual == 1:
        return float(min(count, stages - stage))
    group = run.microbatch_group_size_per_vp_stage or stages
    warmup = (stages - stage - 1) * 2 + (virtual - 1) * group
    return min(count * virtual, warmup + 1) / virtual


@functools.lru_cache(maxsize=16)
def schedule_of(stages: int, microbatches: int, segments: int, virtual: int, slack: int, zero_bubble: bool) -> Schedule:
    """Return the schedule of a step; many micro-batches repeat the same pattern, so a few of them are enough.

    Args:
        stages, microbatches, segments, virtual: see `Pipeline`.
        slack, zero_bubble: see `generators.make`.
    """
    least = max(3, -(-(3 + slack) * stages // segments))
    if virtual > 1:
        least = 2 * smallest_group(Pipeline(stages, microbatches, segments, virtual), slack)
    count = min(microbatches, least)
    return make(Pipeline(stages, count, segments, virtual), slack=slack, zero_bubble=zero_bubble)


def _segment_peaks(model: Architecture, run: Configuration, cluster: Cluster, one: LayerBytes) -> list[float]:
    """Return the peaks of activations with segments or split backwards, from the pipeline's own formulas.

    Args:
        model, run, cluster: see `stages_bytes`.
        one: bytes of a layer.
    """
    virtual, splits = run.virtual_stages, run.seq1f1b_splits
    tokens = run.seq_length
    keys = 0.0  # of a layer, per token: in the KV cache, whether or not the layer is recomputed
    if splits > 1:
        keys = 2.0 * model.groups * model.channels * run.micro_batch_size / run.context_parallel_size
        keys *= run.element / run.tensor_model_parallel_size
    layers = run.stage_layers(model.num_layers)
    per_rank = []
    for stage, count in enumerate(layers):
        recomputed = recomputed_layers(run, count)
        kept = stage_kept(model, run, cluster, count, stage) / tokens - (count - recomputed) * keys
        per_rank.append(
            StageBytes(
                activations=kept / virtual,
                recomputing=one.recomputed * _group(run, count) / tokens,
                kv_cache=count / virtual * keys,
                kv_grads=count / virtual * keys * 4 / run.element,
                deferred=count / virtual * one.deferred / tokens,
                deferred_layer=one.deferred / tokens,
                recomputes_first_layers=0 < recomputed < count,
            )
        )
    schedule = schedule_of(
        run.pipeline_model_parallel_size,
        run.microbatches,
        splits,
        virtual,
        run.seq1f1b_slack,
        run.zero_bubble,
    )
    count = max(1, splits)
    lengths = [tokens // count] * (count - 1) + [tokens - tokens // count * (count - 1)]
    deferred_head = 0.0 if run.cross_entropy_chunk_tokens else deferred_head_bytes(model, run) / tokens
    return peak_bytes(schedule, lengths, per_rank * virtual, deferred_head=deferred_head)


def stages_bytes(
    model: Architecture, run: Configuration, cluster: Cluster, documents: float = 0.0
) -> tuple[dict[str, float], ...]:
    """Return, for every pipeline rank, the bytes of each kind at the peak instant.

    Args:
        model: its architecture.
        run: its configuration.
        cluster: the GPUs.
        documents: packed documents of a micro-batch on a rank, see `packed_backward_bytes`; 0: whole sequences.
    """
    layers = run.stage_layers(model.num_layers)
    stages = run.pipeline_model_parallel_size
    per_layer = _mean_layer(model, run, cluster)
    working = max(per_layer.working, packed_backward_bytes(model, run, documents) if documents else 0.0)
    special = run.seq1f1b_splits > 1 or (run.zero_bubble and stages > 1)
    peaks = _segment_peaks(model, run, cluster, per_layer) if special else None
    workspace = cluster.workspace_bytes
    if run.deterministic_mode is None:
        workspace = (workspace + cluster.deterministic_workspace_bytes) / 2
    elif run.deterministic_mode:
        workspace = cluster.deterministic_workspace_bytes
    if run.tp_comm_overlap and run.tensor_model_parallel_size > 1:
        workspace += cluster.overlap_workspace_bytes  # the communication buffers are outside PyTorch's allocator
    params = stage_params(model, run)
    kept_otherwise = 0.0
    if run.recompute_granularity == "full":
        kept_otherwise = full_layer_bytes(model, run, False, cluster.unfused_rms_norm)
    found = []
    for stage, count in enumerate(layers):
        kinds = dict(_state_bytes(model, run, cluster, params[stage]))
        kept = peaks[stage] if peaks else in_flight(run, stage) * stage_kept(model, run, cluster, count, stage)
        at_loss = 0.0
        again = 0.0
        if not peaks:
            # With the method block, the other layers of a virtual stage have finished backward before its first ones.
            freed = kept_otherwise * (count - recomputed_layers(run, count)) / run.virtual_stages
            again = max(0.0, per_layer.recomputed * _group(run, count) - freed)
        at_layer = again + working / run.seq1f1b_splits
        if stage == stages - 1:
            at_loss = sum(loss_bytes(model, run))
        kinds["activations"] = kept
        if at_loss >= at_layer:
            kinds |= {"logits": at_loss, "working": 0.0}
        else:
            kinds |= {"logits": 0.0, "working": at_layer}
        kinds["buffers"] = workspace + weight_grad_bytes(model, run) + scores_buffer_bytes(model, run)
        kinds["buffers"] += 2 * _boundary_bytes(model, run) if stages > 1 else 0.0
        found.append(kinds)
    return tuple(found)


def _boundary_bytes(model: Architecture, run: Configuration) -> float:
    """Return the bytes of a message between pipeline stages."""
    tokens = run.micro_batch_size * run.seq_length / run.context_parallel_size / run.seq1f1b_splits
    return tokens * model.hidden_size * run.element / (run.tensor_model_parallel_size if run.sequence_parallel else 1)


def _mean_layer(model: Architecture, run: Configuration, cluster: Cluster) -> LayerBytes:
    """Return the bytes of a layer, the mean over layers with and without experts."""
    if not model.num_experts:
        return layer_bytes(model, run, False, cluster.unfused_rms_norm)
    count = sum(model.has_experts(layer) for layer in range(model.num_layers))
    dense, expert = (layer_bytes(model, run, has, cluster.unfused_rms_norm) for has in (False, True))
    share = count / model.num_layers
    return LayerBytes(
        share * expert.kept + (1 - share) * dense.kept,
        max(expert.recomputed, dense.recomputed),
        max(expert.working, dense.working),
        share * expert.deferred + (1 - share) * dense.deferred,
    )


def _group(run: Configuration, layers: int) -> int:
    """Return the layers that backward recomputes at once, of a rank's `layers`."""
    if run.recompute_granularity == "full" and run.recompute_method == "uniform":
        return min(max(1, run.recompute_num_layers), -(-layers // run.virtual_stages))
    if run.recompute_granularity == "full":
        return 1 if run.recompute_num_layers else 0
    return 1


def recomputed_layers(run: Configuration, layers: int) -> float:
    """Return how many of a rank's `layers` are recomputed as a whole."""
    if run.recompute_granularity != "full":
        return 0.0
    if run.recompute_method == "block":
        return float(min(run.recompute_num_layers * run.virtual_stages, layers))
    return float(layers)


def stage_kept(model: Architecture, run: Configuration, cluster: Cluster, layers: int, stage: int) -> float:
    """Return what all layers of a rank keep for one micro-batch."""
    first = sum(run.stage_layers(model.num_layers)[:stage])
    with_experts = sum(model.has_experts(first + layer) for layer in range(layers)) if model.num_experts else 0
    total = 0.0
    for has_experts, count in ((False, layers - with_experts), (True, with_experts)):
        if not count:
            continue
        one = layer_bytes(model, run, has_experts, cluster.unfused_rms_norm)
        if run.recompute_granularity == "full" and run.recompute_method == "block":
            again = recomputed_layers(run, layers) * count / layers
            total += again * one.kept + (count - again) * full_layer_bytes(
                model, run, has_experts, cluster.unfused_rms_norm
            )
        elif run.recompute_granularity == "full":
            total += -(-count // max(1, run.recompute_num_layers)) * one.kept
        else:
            total += count * one.kept
    return total
