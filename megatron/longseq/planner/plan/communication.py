"""Seconds of the messages of one micro-batch: tensor, context, expert and pipeline parallelism.

Ranks are numbered as upstream numbers them: tensor-parallel ranks are neighbours, then context-parallel, data-parallel
and pipeline-parallel ones. So a group with a stride has a known number of ranks on a node, and what its messages share.
"""

import functools
from typing import NamedTuple

from megatron.longseq.attention.plan.comm_volume import LayerShape, all_to_all, ring
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.compute import Seconds
from megatron.longseq.planner.plan.configuration import Configuration
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.sharding.plan.time_model import LinkSpeed, LinkSpeeds

# Share of hidden collectives by which they slow the products beside them: they take memory bandwidth and processors.
CONTENTION = 0.3


class Group(NamedTuple):
    """Ranks that communicate.

    Attributes:
        size: number of ranks.
        inside: how many of them share a node.
    """

    size: int
    inside: int


def group(cluster: Cluster, size: int, stride: int) -> Group:
    """Return a group of every `stride`-th rank.

    Args:
        cluster: the GPUs.
        size: number of ranks of the group.
        stride: distance of its neighbours, in global ranks.
    """
    return Group(size, max(1, min(size, cluster.gpus_per_node // stride)))


def link_rate(cluster: Cluster, message: float) -> float:
    """Return the bytes per second of a rank's link inside a node, in a collective of some size.

    Args:
        cluster: the GPUs.
        message: bytes of the collective.
    """
    return cluster.link_bandwidth * cluster.link_efficiency * message / (message + cluster.message_bytes)


def network_rate(cluster: Cluster, inside: int, efficiency: float = 0.0) -> float:
    """Return the bytes per second at which a group leaves a node, if the node's other ranks do the same.

    Args:
        cluster: the GPUs.
        inside: ranks of the group on a node.
        efficiency: share of the bandwidth that messages reach; 0: the cluster's `network_efficiency`.
    """
    share = cluster.node_bandwidth * min(1.0, inside / cluster.gpus_per_node)
    return share * (efficiency or cluster.network_efficiency)


def ring_seconds(cluster: Cluster, ranks: Group, size: float) -> float:
    """Return the seconds of an all-gather or reduce-scatter of `size` bytes in all; an all-reduce takes twice that.

    Args:
        cluster: the GPUs.
        ranks: the group.
        size: bytes of the whole tensor.
    """
    if ranks.size == 1 or size <= 0:
        return 0.0
    sent = size * (ranks.size - 1) / ranks.size
    seconds = sent / link_rate(cluster, size) if ranks.inside > 1 else 0.0
    latency = cluster.link_latency * (ranks.size - 1)
    if ranks.size > ranks.inside:
        seconds = max(seconds, sent / network_rate(cluster, ranks.inside))
        crossing = min(ranks.size - 1, ranks.size // ranks.inside)  # of the hops; with a rank on each node, all of them
        latency += (cluster.network_latency - cluster.link_latency) * crossing
    return seconds + latency


def exchange_seconds(cluster: Cluster, ranks: Group, size: float) -> float:
    """Return the seconds of an all-to-all in which a rank holds `size` bytes.

    Args:
        cluster: the GPUs.
        ranks: the group.
        size: bytes that a rank holds before the all-to-all.
    """
    if ranks.size == 1 or size <= 0:
        return 0.0
    near = size * (ranks.inside - 1) / ranks.size
    seconds = near / link_rate(cluster, size) + cluster.link_latency * ranks.inside
    if ranks.size > ranks.inside:
        far = size * (ranks.size - ranks.inside) / ranks.size
        seconds = max(seconds, far / network_rate(cluster, 1) + cluster.network_latency * ranks.size / ranks.inside)
    return seconds


class LayerMessages(NamedTuple):
    """Seconds of a layer's communication in a micro-batch that nothing hides, and seconds that compute hides.

    Attributes:
        forward, backward: exposed seconds of tensor parallelism.
        context_forward, context_backward: exposed seconds of context parallelism.
        expert_forward, expert_backward: exposed seconds of expert parallelism.
        hidden: seconds of tensor and context parallelism that run beside compute.
    """

    forward: float
    backward: float
    context_forward: float
    context_backward: float
    expert_forward: float
    expert_backward: float
    hidden: float


@functools.lru_cache(maxsize=65536)
def layer_messages(
    model: Architecture, cluster: Cluster, run: Configuration, has_experts: bool, compute: Seconds
) -> LayerMessages:
    """Return the communication of a layer and a micro-batch.

    Args:
        model: its architecture.
        cluster: the GPUs.
        run: the configuration.
        has_experts: whether the layer has experts.
        compute: seconds of the layer. A ring sends keys, values and their gradients beside core attention, and
            backward's collectives run beside the products of weight gradients.
    """
    tensor = group(cluster, run.tensor_model_parallel_size, 1)
    tokens = run.micro_batch_size * run.seq_length / run.context_parallel_size
    segments = run.seq1f1b_splits
    once = segments * ring_seconds(cluster, tensor, tokens * model.hidden_size * run.element / segments)
    count = 2 if not has_experts else 1
    forward = 2.0 * count * once  # an all-gather and a reduce-scatter, or an all-reduce, per block
    backward, hidden = forward, 0.0
    if run.sequence_parallel:
        hidden += count * once  # inputs are gathered again for weight gradients, beside the gradients of inputs
    if cluster.overlaps_input_gradients or run.sequence_parallel:
        beside = min(count * once * (1 if run.sequence_parallel else 2), compute.weight)
        backward, hidden = backward - beside, hidden + beside
    backward += CONTENTION * hidden
    if run.tp_comm_overlap:
        forward, backward, hidden = 0.2 * forward, 0.2 * backward, hidden + 0.8 * (forward + backward)
    context = _context_seconds(model, cluster, run, compute)
    expert = _expert_exchange(model, cluster, run, tokens) if has_experts else 0.0
    return LayerMessages(forward, backward, context[0], context[1], 2 * expert, 2 * expert, hidden + context[2])


def _expert_exchange(model: Architecture, cluster: Cluster, run: Configuration, tokens: float) -> float:
    """Return the seconds of dispatching tokens to experts, or of combining them."""
    stride = run.expert_tensor_parallel_size or run.tensor_model_parallel_size
    ranks = group(cluster, run.expert_model_parallel_size, stride)
    share = run.tensor_model_parallel_size if run.sequence_parallel else 1
    sent = tokens / share * model.moe_router_topk * run.expert_share
    return exchange_seconds(cluster, ranks, sent * model.hidden_size * run.element)


@functools.lru_cache(maxsize=16384)
def _context_bytes(
    mesh: tuple[int, int],
    lengths: tuple[int, ...],
    heads: int,
    groups: int,
    tensor: int,
    sizes: tuple[int, int, int],
) -> tuple[float, float, float, float]:
    """Return a rank's bytes of all-to-all and ring, forward and backward, from the attention's own formulas.

    Segments after the first send the keys of all earlier ones round the ring again.
    """
    batch, channels, element = sizes
    ulysses, ring_size = mesh
    layout = Layout(Mesh(ulysses=ulysses, ring=ring_size), lengths)
    layer = LayerShape(layout, Heads.of(heads, groups, tensor), batch, channels, element)
    exchanged, sent = all_to_all(layer), ring(layer)
    count = ulysses * ring_size
    return (
        exchanged.forward_bytes / count,
        exchanged.backward_bytes / count,
        sent.forward_bytes / count if ring_size > 1 else 0.0,
        sent.backward_bytes / count if ring_size > 1 else 0.0,
    )


def _context_seconds(
    model: Architecture, cluster: Cluster, run: Configuration, compute: Seconds
) -> tuple[float, float, float]:
    """Return the exposed seconds of context parallelism in forward and backward, and the hidden ones."""
    if run.context_parallel_size == 1:
        return 0.0, 0.0, 0.0
    ulysses, ring_size = run.mesh
    tensor = run.tensor_model_parallel_size
    sizes = (run.micro_batch_size, model.query_size // model.num_attention_heads, run.element)
    segments, multiple = run.seq1f1b_splits, 2 * run.context_parallel_size
    length = run.seq_length // segments // multiple * multiple
    lengths = (*(length,) * (segments - 1), run.seq_length - (segments - 1) * length)
    bytes_ = _context_bytes(run.mesh, lengths, model.num_attention_heads, model.groups, tensor, sizes)
    head_first = run.context_parallel_placement == "head-first"
    exchange = group(cluster, ulysses, tensor if head_first else tensor * ring_size)
    hops = group(cluster, ring_size, tensor * ulysses if head_first else tensor)
    share = ulysses / max(1, ulysses - 1)  # the formulas count what is sent; the model wants what is held
    out = segments * exchange_seconds(cluster, exchange, bytes_[0] * share / segments)
    back = segments * exchange_seconds(cluster, exchange, bytes_[1] * share / segments)
    rate = link_rate(cluster, 64e6) if hops.inside == ring_size else network_rate(cluster, 1)
    steps = segments * (ring_size - 1) * (cluster.link_latency if hops.inside == ring_size else cluster.network_latency)
    ring_out, ring_back = bytes_[2] / rate + steps, bytes_[3] / rate + steps
    if ring_size == 1:
        ring_out = ring_back = 0.0
    shown_out = max(0.0, ring_out - compute.attention)
    shown_back = max(0.0, ring_back - compute.attention_backward)
    hidden = ring_out - shown_out + ring_back - shown_back
    return out + shown_out, back + shown_back, hidden


def boundary_seconds(model: Architecture, cluster: Cluster, run: Configuration) -> float:
    """Return the seconds of a message between pipeline stages, the mean over the boundaries that leave a node."""
    stages = run.pipeline_model_parallel_size
    if stages == 1:
        return 0.0
    tokens = run.micro_batch_size * run.seq_length / run.context_parallel_size / run.seq1f1b_splits
    size = tokens * model.hidden_size * run.element
    gathered = 0.0
    if run.sequence_parallel:
        size /= run.tensor_model_parallel_size
    elif cluster.splits_messages:
        gathered = ring_seconds(cluster, group(cluster, run.tensor_model_parallel_size, 1), size)
        size /= run.tensor_model_parallel_size
    per_stage = run.gpus // stages
    near = cluster.link_latency + size / (cluster.link_bandwidth * cluster.link_efficiency)
    far = cluster.network_latency + size / network_rate(cluster, 1, cluster.pairwise_efficiency)
    if run.gpus <= cluster.gpus_per_node:
        return near + gathered
    if per_stage >= cluster.gpus_per_node:
        return far + gathered
    crossing = per_stage / cluster.gpus_per_node
    return crossing * far + (1 - crossing) * near + gathered


def data_links(cluster: Cluster, stride: int) -> LinkSpeeds:
    """Return the links of data-parallel ranks for the sharding's time model.

    Args:
        cluster: the GPUs.
        stride: distance of neighbours, in global ranks.
    """
    inside = max(1, cluster.gpus_per_node // stride)
    between = network_rate(cluster, 1, cluster.data_efficiency)
    return LinkSpeeds(
        LinkSpeed(cluster.link_bandwidth * cluster.link_efficiency, cluster.link_latency),
        LinkSpeed(between, cluster.network_latency),
        channels=inside,
    )
