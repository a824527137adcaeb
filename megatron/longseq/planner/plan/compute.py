"""Seconds of the kernels of one micro-batch on a GPU: products by shape, attention, elementwise kernels.

A matrix product runs in tiles. The tiles fill the streaming multiprocessors in waves, of which the last may be partly
empty, and every tile starts and ends with work that a short inner dimension does not hide. The two constants of this
model, `product_efficiency` and `product_depth`, were fitted to published measurements of single products; measured
products of a profile (`calibrate`) replace it.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

from megatron.longseq.pipeline.plan.segment_cost import ATTENTION_BACKWARD, cells
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.configuration import Configuration
from megatron.longseq.planner.plan.model import Architecture

# Rows and columns of a tile, and the rate of its kernel relative to the largest tiles'. SimuMax's measured products of
# one to three waves show that libraries keep to large tiles, or lose about as much with small ones.
_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.8), (256, 64, 0.65), (64, 256, 0.65), (128, 64, 0.62),
          (64, 128, 0.62), (64, 64, 0.45))  # fmt: skip
_ALIGNED = 8  # elements: rows of other lengths take kernels without vectorised loads
_MISALIGNED_RATE = 1 / 16  # such products run without tensor cores


class Seconds(NamedTuple):
    """Seconds of one micro-batch in a layer, or in the head.

    Attributes:
        forward: of the forward.
        backward: of the gradients of inputs and weights, without recomputation.
        weight: the part of `backward` that computes weight gradients.
        attention, attention_backward: the parts of `forward` and `backward` in core attention.
    """

    forward: float
    backward: float
    weight: float
    attention: float = 0.0
    attention_backward: float = 0.0

    def __add__(self, other: object) -> "Seconds":
        assert isinstance(other, Seconds)
        return Seconds(*(one + two for one, two in zip(self, other, strict=True)))


@functools.lru_cache(maxsize=65536)
def product_seconds(
    cluster: Cluster, m: int, n: int, k: int, fp8: bool = False, batch: int = 1, rate: float = 1.0
) -> float:
    """Return the seconds of a product of m x k by k x n.

    Args:
        cluster: the GPUs.
        m, n, k: sizes.
        fp8: whether its inputs are in fp8.
        batch: number of such products in one kernel.
        rate: peak of the kernel's dtype over the one of bf16, see `float32_rate`.
    """
    if min(m, n, k) < 1:
        return 0.0
    moved = 2.0 * batch * (m * k + k * n + m * n) / (cluster.memory_bandwidth * cluster.memory_efficiency)
    peak = 1e12 * cluster.peak_tflops * cluster.product_efficiency * rate
    if fp8 and cluster.fp8_peak_tflops:
        peak = 1e12 * cluster.fp8_peak_tflops * cluster.fp8_efficiency
    if batch > 1 and (n % _ALIGNED or k % _ALIGNED):
        peak *= _MISALIGNED_RATE
    best = math.inf
    for rows, columns, share in _TILES:
        tiles = batch * (-(-m // rows)) * (-(-n // columns))
        area = -(-tiles // cluster.sms) * cluster.sms * rows * columns
        best = min(best, 2.0 * area * (k + cluster.product_depth) / (peak * share))
    if cluster.products and batch == 1 and not fp8:
        best /= _measured_ratio(cluster, m, n, k)
    return max(best, moved)


@functools.lru_cache(maxsize=65536)
def _measured_ratio(cluster: Cluster, m: int, n: int, k: int) -> float:
    """Return the measured over the modelled rate of a product: the mean of near shapes, by distance in log sizes."""
    bare = _without_products(cluster)
    total, weight = 1e-3, 1e-3  # far from all measured shapes, the model alone
    for one in cluster.products:
        distance = abs(math.log(one.m / m)) + abs(math.log(one.n / n)) + abs(math.log(one.k / k))
        if distance > 2:
            continue
        modelled = 2.0 * one.m * one.n * one.k / product_seconds(bare, one.m, one.n, one.k)
        near = 1.0 / (1e-3 + distance**3)
        total, weight = total + near * 1e12 * one.tflops / modelled, weight + near
    return total / weight


@functools.lru_cache(maxsize=64)
def _without_products(cluster: Cluster) -> Cluster:
    return replace(cluster, products=())


def float32_rate(cluster: Cluster, run: Configuration, *, te: bool = False) -> float:
    """Return the peak of a product in the run's dtype over the one of bf16; 1 if the run is in 16 bits.

    PyTorch computes float32 products without tensor cores. TransformerEngine computes those of its linear layers in
    TF32, whose peak is half of bf16's on A100 and later GPUs.

    Args:
        cluster: the GPUs.
        run: its configuration.
        te: whether it is a product of a linear layer, which may be TransformerEngine's.
    """
    if run.element < 4 or not cluster.fp32_peak_tflops:
        return 1.0
    return 0.5 if te and not run.is_local else cluster.fp32_peak_tflops / cluster.peak_tflops


def moved_seconds(cluster: Cluster, size: float) -> float:
    """Return the seconds in which elementwise kernels read and write `size` bytes.

    Args:
        cluster: the GPUs.
        size: bytes that are read and written.
    """
    return size / (cluster.memory_bandwidth * cluster.memory_efficiency)


def linear_seconds(
    cluster: Cluster, run: Configuration, tokens: int, outputs: int, inputs: int, *, is_head: bool = False
) -> Seconds:
    """Return the seconds of a linear layer, with the accumulation of its weight gradients in memory.

    Args:
        cluster: the GPUs.
        run: its configuration.
        tokens: rows of the input.
        outputs, inputs: sizes of the weight on a rank.
        is_head: whether it is the output layer, which is upstream's and not in fp8.
    """
    low = bool(run.fp8) and not is_head
    rate = float32_rate(cluster, run, te=not is_head)
    forward = product_seconds(cluster, tokens, outputs, inputs, low, rate=rate)
    data = product_seconds(cluster, tokens, inputs, outputs, low, rate=rate)
    weight = product_seconds(cluster, inputs, outputs, tokens, low, rate=rate)
    grad = 4 if run.accumulate_allreduce_grads_in_fp32 else 2
    # Unfused, the product writes a gradient of its own, which another kernel reads and adds to the sum.
    read = 2.0 * grad + (0 if run.gradient_accumulation_fusion else run.element)
    weight += moved_seconds(cluster, read * outputs * inputs)
    if low:  # casting inputs, gradients and weights to fp8, with their transposes
        cast = moved_seconds(cluster, 4.0 * tokens * inputs + 2.0 * outputs * inputs / max(1, run.microbatches))
        forward, data = forward + cast, data + moved_seconds(cluster, 4.0 * tokens * outputs)
    return Seconds(forward, data + weight, weight)


def attention_seconds(model: Architecture, cluster: Cluster, run: Configuration) -> Seconds:
    """Return the seconds of core attention of a rank, the whole sequence of a micro-batch."""
    heads = model.num_attention_heads / run.tensor_model_parallel_size
    length, batch = run.seq_length, run.micro_batch_size
    per_pair = (model.query_size + model.value_size) / model.num_attention_heads
    if run.fused_attention:
        pairs = batch * heads * cells(0, length, model.window_size or None) / run.context_parallel_size
        work = 2.0 * per_pair * pairs
        local = length / run.context_parallel_size / run.seq1f1b_splits
        rate = local / (local + 384.0)
        peak = 1e12 * cluster.peak_tflops * float32_rate(cluster, run)
        forward = work / (peak * cluster.attention_efficiency * rate)
        backward = ATTENTION_BACKWARD * work / (peak * cluster.attention_backward_efficiency * rate)
        return Seconds(forward, backward, 0.0, forward, backward)
    count, channels = max(1, round(batch * heads)), model.query_size // model.num_attention_heads
    if model.query_size % model.num_attention_heads:
        channels = -(-channels // _ALIGNED) * _ALIGNED  # no such head exists; the row's number of heads is in error
    kernel = float32_rate(cluster, run)
    scores = product_seconds(cluster, length, length, channels, batch=count, rate=kernel)
    values = product_seconds(cluster, length, channels, length, batch=count, rate=kernel)
    size = float(count) * length * length * run.element
    dropout = 1.0 if model.attention_dropout else 0.0
    if not fuses_softmax(model, run):
        dropout += 4.0  # casts to float32 and back, the mask, and the scale are kernels of their own
    forward = scores + values + moved_seconds(cluster, size * (2.0 + 2.5 * dropout))
    backward = 2 * (scores + values) + moved_seconds(cluster, size * (3.0 + 2.5 * dropout))
    return Seconds(forward, backward, 0.0, forward, backward)


def fuses_softmax(model: Architecture, run: Configuration) -> bool:
    """Return whether scale, mask and softmax are one kernel, where attention keeps its scores.

    Upstream's kernel takes four heads of the micro-batch at a time.
    """
    if run.fused_attention or not run.is_local:
        return True
    heads = run.micro_batch_size * model.num_attention_heads // run.tensor_model_parallel_size
    return run.masked_softmax_fusion and run.element == 2 and heads % 4 == 0


@functools.lru_cache(maxsize=65536)
def layer_seconds(model: Architecture, cluster: Cluster, run: Configuration, has_experts: bool) -> Seconds:
    """Return the seconds of a layer's kernels for one micro-batch, without recomputation and communication.

    Every segment of a sequence runs the kernels again, on fewer tokens.

    Args:
        model: its architecture.
        cluster: the GPUs.
        run: its configuration.
        has_experts: whether the layer's MLP consists of experts.
    """
    tensor, hidden, segments = run.tensor_model_parallel_size, model.hidden_size, run.seq1f1b_splits
    tokens = run.micro_batch_size * run.seq_length // run.context_parallel_size // segments
    if model.multi_latent_attention:
        total = _latent_seconds(model, cluster, run, tokens)
    else:
        width = (model.query_size + 2 * model.key_size(tensor)) // tensor
        total = linear_seconds(cluster, run, tokens, width, hidden)
        total += linear_seconds(cluster, run, tokens, hidden, model.value_size // tensor)
    gates = 2 if model.swiglu else 1
    if has_experts:
        total += _expert_seconds(model, cluster, run, tokens)
    else:
        total += linear_seconds(cluster, run, tokens, gates * model.ffn // tensor, hidden)
        total += linear_seconds(cluster, run, tokens, hidden, model.ffn // tensor)
        total += _activation_seconds(model, cluster, run, tokens * model.ffn / tensor)
    total += _norm_seconds(model, cluster, run, tokens)
    return Seconds(*(segments * part for part in total)) + attention_seconds(model, cluster, run)


def _norm_seconds(model: Architecture, cluster: Cluster, run: Configuration, tokens: int) -> Seconds:
    """Return the seconds of norms, dropout, residual additions and rotary positions."""
    elements = float(tokens) * model.hidden_size
    if run.sequence_parallel:
        elements /= run.tensor_model_parallel_size
    mask = 2.0 if model.hidden_dropout else 0.0
    forward = moved_seconds(cluster, elements * (2 * 2 * run.element + 2 * 3 * run.element + mask))
    backward = moved_seconds(cluster, elements * (2 * 4 * run.element + 2 * 2 * run.element + mask))
    if model.position_embedding_type != "learned_absolute":
        rotated = tokens * (model.query_size + model.key_size()) / run.tensor_model_parallel_size
        once = moved_seconds(cluster, 2.0 * run.element * rotated)
        forward, backward = forward + once, backward + once
    return Seconds(forward, backward, 0.0)


def _activation_seconds(model: Architecture, cluster: Cluster, run: Configuration, elements: float) -> Seconds:
    """Return the seconds of the activation function on some outputs."""
    gates = 2 if model.swiglu else 1
    forward = moved_seconds(cluster, run.element * elements * (gates + 1))
    return Seconds(forward, moved_seconds(cluster, run.element * elements * (2 * gates + 1)), 0.0)


def _latent_seconds(model: Architecture, cluster: Cluster, run: Configuration, tokens: int) -> Seconds:
    """Return the seconds of the projections of multi-latent attention."""
    tensor, hidden, heads = run.tensor_model_parallel_size, model.hidden_size, model.num_attention_heads
    total = Seconds(0.0, 0.0, 0.0)
    inputs = hidden
    if model.q_lora_rank:
        total += linear_seconds(cluster, run, tokens, model.q_lora_rank, hidden)
        inputs = model.q_lora_rank
    total += linear_seconds(cluster, run, tokens, model.query_size // tensor, inputs)
    total += linear_seconds(cluster, run, tokens, model.kv_lora_rank + model.qk_pos_emb_head_dim, hidden)
    total += linear_seconds(
        cluster, run, tokens, heads * (model.qk_head_dim + model.v_head_dim) // tensor, model.kv_lora_rank
    )
    return total + linear_seconds(cluster, run, tokens, hidden, heads * model.v_head_dim // tensor)


def _expert_seconds(model: Architecture, cluster: Cluster, run: Configuration, tokens: int) -> Seconds:
    """Return the seconds of a rank's experts and shared expert, if tokens are spread evenly."""
    tensor = run.expert_tensor_parallel_size or run.tensor_model_parallel_size
    gates, width, hidden = (2 if model.swiglu else 1), model.expert_ffn, model.hidden_size
    routed = tokens * model.moe_router_topk // (run.tensor_model_parallel_size if run.sequence_parallel else 1) * tensor
    routed = round(routed * run.expert_share)
    experts = max(1, model.num_experts // run.expert_model_parallel_size)
    each = max(1, routed // experts)
    one = linear_seconds(cluster, run, each, gates * width // tensor, hidden)
    one += linear_seconds(cluster, run, each, hidden, width // tensor)
    total = Seconds(*(experts * value for value in one))
    total += _activation_seconds(model, cluster, run, routed * width / tensor)
    moved = moved_seconds(cluster, 8.0 * run.element * routed * hidden / tensor)
    total += Seconds(moved, moved, 0.0)
    if model.moe_shared_expert_intermediate_size:
        shared = model.moe_shared_expert_intermediate_size // run.tensor_model_parallel_size
        total += linear_seconds(cluster, run, tokens, gates * shared, hidden)
        total += linear_seconds(cluster, run, tokens, hidden, shared)
    return total


@functools.lru_cache(maxsize=65536)
def head_seconds(model: Architecture, cluster: Cluster, run: Configuration) -> Seconds:
    """Return the seconds of the output layer and the loss for one micro-batch.

    A chunked loss computes the logits again in backward.
    """
    tensor = run.tensor_model_parallel_size
    segments = run.seq1f1b_splits
    tokens = run.micro_batch_size * run.seq_length // run.context_parallel_size // segments
    rows = model.padded(tensor) // tensor
    total = linear_seconds(cluster, run, tokens, rows, model.hidden_size, is_head=True)
    logits = float(tokens) * rows
    if run.cross_entropy_chunk_tokens:
        total = total._replace(backward=total.backward + total.forward)
    # Unfused, the loss converts to float32, finds the maximum, exponentiates and sums, and backward scales and casts.
    forward, backward = (6.0, 4.0) if run.cross_entropy_loss_fusion else (24.0, 14.0)
    total += Seconds(moved_seconds(cluster, forward * logits), moved_seconds(cluster, backward * logits), 0.0)
    return Seconds(*(segments * part for part in total))


def optimizer_seconds(cluster: Cluster, parameters: float) -> float:
    """Return the seconds of Adam on the parameters of a rank's shard, with the norm of the gradients.

    Adam reads gradient, main copy and two moments, and writes the last three and the parameter: 34 bytes; the norm
    reads the gradients again.

    Args:
        cluster: the GPUs.
        parameters: number of parameters of the shard.
    """
    return moved_seconds(cluster, 38.0 * parameters)
