"""The cost model of FlexSP's groups (`flexsp.plan.cost`), filled from the planner's model of layers, links and memory.

FlexSP prices a group by its tokens and by the sum of its squared lengths. Attention has the planner's seconds of a
document that fills one rank, because the kernels of longer documents have as many tokens on each rank of their group.
All other seconds of a stage are a line through two numbers of tokens. So the start-up of a micro-batch contains what
does not shrink with its tokens, such as launches of kernels and the update of weight gradients in memory.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.flexsp.plan.cost import GroupCostModel, GroupLinks
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.communication import exchange_seconds, group, link_rate, network_rate
from megatron.longseq.planner.plan.configuration import Configuration
from megatron.longseq.planner.plan.memory import stages_bytes
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.planner.plan.step import StageSeconds, stage_seconds

UNIT = 256  # tokens of a rank are limited to multiples of it
_MESSAGE = 64e6  # bytes of a collective whose speed stands for all
_RING_BYTES = 16  # that a ring of 16-bit elements sends of a channel: keys and values twice, and their gradients
_FREE = 1e12  # factor by which attention is made faster to see the seconds without it


def packed_run(model: Architecture, run: Configuration, tokens: int, microbatches: int) -> Configuration:
    """Return a run whose micro-batches have packs of `tokens` tokens on every rank.

    Two ranks share a sequence where that is possible, because groups of several ranks keep a little more.

    Args:
        model: its architecture.
        run: layout, recomputation and sharding, without context parallelism.
        tokens: tokens of a pack on a rank.
        microbatches: micro-batches of a step.
    """
    ranks = run.data_parallel_size
    shared = ranks % 2 == 0
    heads = Heads.of(model.num_attention_heads, model.groups, run.tensor_model_parallel_size)
    return replace(
        run,
        seq_length=2 * tokens if shared else tokens,
        context_parallel_size=2 if shared else 1,
        cp_comm_type="a2a" if heads.allows(2) else "p2p",
        micro_batch_size=1,
        global_batch_size=(ranks // 2 if shared else ranks) * microbatches,
        attention_backend="flash",
    )


def rank_bytes(
    model: Architecture, cluster: Cluster, run: Configuration, tokens: int, documents: float = 1.0
) -> tuple[tuple[dict[str, float], ...], float]:
    """Return the bytes of every pipeline rank at its peak by kind, and those of the fullest one with the reserve.

    Args:
        model: its architecture.
        cluster: the GPUs.
        run: see `packed_run`.
        tokens: tokens of a micro-batch on a rank.
        documents: of a micro-batch on a rank; for ranks of an all-to-all, over their number.
    """
    packed = packed_run(model, run, tokens, 2 * run.pipeline_model_parallel_size)
    stages = stages_bytes(model, packed, cluster, documents)
    peak = max(sum(kinds.values()) for kinds in stages)
    return stages, peak + cluster.reserve_bytes(peak)


def most_tokens(
    model: Architecture, cluster: Cluster, run: Configuration, needed: int, steps: Sequence[Sequence[int]] = ()
) -> int:
    """Return the most tokens of a micro-batch that fit on a rank, a multiple of `UNIT`; 0 if none do.

    The rank may get the shortest documents of a step, which need the most memory.

    Args:
        model: its architecture.
        cluster: the GPUs.
        run: layout, recomputation and sharding.
        needed: tokens above which more bring nothing.
        steps: lengths of the documents of some steps; none: a rank has one document.
    """
    filled = [list(accumulate(sorted(lengths))) for lengths in steps]
    low, high = 0, -(-needed // UNIT)
    while low < high:
        middle = (low + high + 1) // 2
        documents = max((bisect_right(sums, middle * UNIT) for sums in filled), default=1)
        if rank_bytes(model, cluster, run, middle * UNIT, max(1, documents))[1] <= cluster.memory_bytes:
            low = middle
        else:
            high = middle - 1
    return low * UNIT


def group_links(cluster: Cluster, run: Configuration) -> GroupLinks:
    """Return the speeds of the links between data-parallel ranks.

    Full recomputation sends the messages of the forward twice. The cost model of groups has no such messages, so links
    are slower by as much instead.

    Args:
        cluster: the GPUs.
        run: the layout; every `tensor_model_parallel_size`-th GPU is a data-parallel rank.
    """
    tensor, ranks = run.tensor_model_parallel_size, run.data_parallel_size
    again = run.recompute_granularity == "full"
    exchanged, sent = (2 / 3, _RING_BYTES / (_RING_BYTES + 2 * run.element)) if again else (1.0, 1.0)
    instant = replace(cluster, link_latency=0.0, network_latency=0.0)
    node = max(1, min(ranks, cluster.gpus_per_node // tensor))
    speeds = []
    for power in range(1, max(2, ranks.bit_length())):
        size = 2**power
        seconds = exchange_seconds(instant, group(cluster, size, tensor), _MESSAGE)
        speeds.append((size, exchanged * _MESSAGE * (size - 1) / size / seconds))
    latency = cluster.link_latency if ranks <= node else cluster.network_latency
    between = network_rate(cluster, cluster.gpus_per_node) / tensor
    inside, adapter = link_rate(cluster, _MESSAGE), network_rate(cluster, 1)
    return GroupLinks(node, tuple(speeds), sent * inside, sent * between, latency, latency, sent * adapter)


def group_cost(model: Architecture, cluster: Cluster, run: Configuration, tokens: int) -> tuple[GroupCostModel, float]:
    """Return the cost model of groups under a layout, and the seconds per token of exposed tensor-parallel messages.

    Args:
        model: its architecture.
        cluster: the GPUs.
        run: layout, recomputation and sharding, without context parallelism.
        tokens: most tokens of a micro-batch on a rank.
    """
    plain = replace(
        cluster,
        attention_efficiency=cluster.attention_efficiency * _FREE,
        attention_backward_efficiency=cluster.attention_backward_efficiency * _FREE,
    )
    whole, part = (_slowest(model, plain, run, count) for count in (tokens, max(1, tokens // 4)))
    linear = (whole.both - part.both) / max(1, tokens - max(1, tokens // 4))
    stragglers = 1.0 + cluster.imbalance * math.log2(max(1, run.gpus))
    filled = _slowest(model, cluster, run, tokens)
    attention, forward = filled.both - whole.both, filled.forward - whole.forward
    square, token = (0.0, attention / tokens) if model.window_size else (attention / tokens**2, 0.0)
    cost = GroupCostModel(
        name="planner",
        square=square * stragglers,
        linear=(linear + token) * stragglers,
        fixed=max(0.0, whole.both - linear * tokens) * stragglers,
        tokens_per_rank=tokens,
        layers=max(run.stage_layers(model.num_layers)),
        heads=Heads.of(model.num_attention_heads, model.groups, run.tensor_model_parallel_size),
        dim=model.channels,
        links=group_links(cluster, run),
        item=run.element,
        forward_share=forward / attention,
    )
    return cost, whole.tensor / tokens


def _slowest(model: Architecture, cluster: Cluster, run: Configuration, tokens: int) -> StageSeconds:
    """Return the seconds of a micro-batch of one document on the slowest pipeline rank."""
    single_rank = replace(
        run,
        seq_length=tokens,
        micro_batch_size=1,
        context_parallel_size=1,
        global_batch_size=run.data_parallel_size,
        attention_backend="flash",
    )
    return max(stage_seconds(model, cluster, single_rank), key=lambda one: one.both)
