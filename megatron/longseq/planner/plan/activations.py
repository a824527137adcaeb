"""Bytes that a layer, the embedding and the loss keep from forward to backward, on one rank.

The tensors are those that autograd saves in upstream's layers. For TransformerEngine's layers the sum for a GPT layer
with dropout is the 34 * s * b * h of Korthikanti et al. (arXiv 2205.05198, section 4.1).
"""

import functools
from dataclasses import dataclass, replace

from megatron.longseq.planner.plan.compute import fuses_softmax
from megatron.longseq.planner.plan.configuration import Configuration
from megatron.longseq.planner.plan.model import Architecture

_TILE_ROWS = 128  # of flash attention's backward
_QUERY_MULTIPLE = 32  # channels of a head are rounded up to it


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes of one layer and one micro-batch on a rank.

    Attributes:
        kept: from forward to backward.
        recomputed: in addition, while backward has recomputed a layer.
        working: temporary tensors at the peak of a layer's backward.
        deferred: from backward to weight gradients that are computed later (--zero-bubble): the inputs of the linear
            layers and the gradients of their outputs.
    """

    kept: float
    recomputed: float
    working: float
    deferred: float = 0.0


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Elements per micro-batch that tensors of a rank have.

    Attributes:
        tokens: of a rank's share of the sequence.
        whole: elements of a hidden state that all tensor-parallel ranks have.
        hidden: elements of a hidden state; a share of it with sequence parallelism.
        tensor: tensor-parallel size.
        item: bytes of an element.
    """

    tokens: float
    whole: float
    hidden: float
    tensor: int
    item: int


def _sizes(model: Architecture, run: Configuration) -> _Sizes:
    tokens = run.micro_batch_size * run.seq_length / run.context_parallel_size
    whole = tokens * model.hidden_size
    tensor = run.tensor_model_parallel_size
    return _Sizes(tokens, whole, whole / (tensor if run.sequence_parallel else 1), tensor, run.element)


def attention_bytes(model: Architecture, run: Configuration) -> tuple[float, float]:
    """Return what attention keeps in a layer, and the part that recomputing core attention would free.

    Args:
        model: its architecture.
        run: its configuration.

    Returns:
        Two numbers of bytes, of a layer and a micro-batch on a rank; the second is contained in the first.
    """
    size = _sizes(model, run)
    per_token = size.tokens * size.item / size.tensor
    heads = model.num_attention_heads / size.tensor
    out = model.value_size * per_token
    if model.multi_latent_attention:
        inputs = _latent_inputs(model, run, size)
    else:
        inputs = (model.query_size + 2 * model.key_size(size.tensor)) * per_token
        if run.is_local and not run.fused_attention:  # the keys and values of a group are copied to all of its heads
            inputs = 3 * model.query_size * per_token
        if model.qk_layernorm:
            inputs += (model.query_size + model.key_size(size.tensor)) * per_token
    if not run.fused_attention:
        scores = _scores(model, run)
        freed = scores * (run.element * (2 if model.attention_dropout else 1) + (1 if model.attention_dropout else 0))
        if not fuses_softmax(model, run) and run.element == 2:
            freed += scores * run.element  # the probabilities before they are cast to 16 bits
        if not fuses_softmax(model, run) and not run.create_attention_mask_in_dataloader:
            freed += float(run.seq_length) ** 2  # a mask of every layer's own
        return inputs + out + freed, freed
    freed = 4.0 * heads * size.tokens
    if _copies(model, run):
        freed += out  # the kernel's output in its own layout
    if run.context_parallel_size > 1 and run.mesh[0] > 1:
        freed += out  # the kernel's output before the all-to-all
    return inputs + out + freed, freed


def _scores(model: Architecture, run: Configuration) -> float:
    """Return the attention scores of a layer and a micro-batch on a rank, a number per query, key and head."""
    heads = model.num_attention_heads / run.tensor_model_parallel_size
    return run.micro_batch_size * heads * float(run.seq_length) ** 2


def _rotation_bytes(model: Architecture, run: Configuration) -> float:
    """Return what unfused rotary embeddings keep in a layer: cosines and sines for the queries, and for the keys."""
    if run.apply_rope_fusion or model.position_embedding_type in ("learned_absolute", "none"):
        return 0.0
    channels = model.qk_pos_emb_head_dim if model.multi_latent_attention else model.channels * model.rotary_percent
    return 4.0 * channels * run.seq_length / run.context_parallel_size * run.element


def _copies(model: Architecture, run: Configuration) -> bool:
    """Return whether the attention kernel copies its inputs to a layout of its own (flash-attn in TE's layers)."""
    return model.position_embedding_type == "learned_absolute" and run.fused_attention


def _latent_inputs(model: Architecture, run: Configuration, size: _Sizes) -> float:
    """Return what the projections of multi-latent attention keep, up to the kernel's inputs."""
    tokens, item, tensor = size.tokens, size.item, size.tensor
    latent = (2 * (model.q_lora_rank + model.kv_lora_rank) + model.qk_pos_emb_head_dim) * tokens * item
    heads = model.num_attention_heads / tensor
    rotated = 2 * heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    values = heads * model.v_head_dim
    return latent + (rotated + values) * tokens * item


def mlp_bytes(model: Architecture, run: Configuration, ffn: float, tokens: float, tensor: int) -> tuple[float, float]:
    """Return what an MLP keeps between its products, and the part that recomputing the activation would free.

    Args:
        model: its architecture.
        run: its configuration.
        ffn: width of the MLP.
        tokens: tokens that it computes.
        tensor: ranks that share its width.

    Returns:
        Two numbers of bytes on a rank; the second is contained in the first.
    """
    gates = 2 if model.swiglu else 1
    before, after = gates * ffn * tokens * run.element / tensor, ffn * tokens * run.element / tensor
    return before + after, after


def expert_bytes(model: Architecture, run: Configuration) -> float:
    """Return the bytes that routing, experts and combining keep in a layer with experts (all-to-all dispatcher)."""
    size = _sizes(model, run)
    tensor = run.expert_tensor_parallel_size or run.tensor_model_parallel_size
    routed = size.tokens / (size.tensor if run.sequence_parallel else 1) * model.moe_router_topk * tensor
    routed *= run.expert_share
    hidden = routed * model.hidden_size * run.element / tensor
    inner, _ = mlp_bytes(model, run, model.expert_ffn, routed, tensor)
    router = 3 * 4 * size.tokens * model.num_experts / (size.tensor if run.sequence_parallel else 1)
    kept = 2 * hidden + inner + router
    if model.moe_shared_expert_intermediate_size:
        kept += mlp_bytes(model, run, model.moe_shared_expert_intermediate_size, size.tokens, size.tensor)[0]
    return kept


@functools.lru_cache(maxsize=65536)
def layer_bytes(model: Architecture, run: Configuration, has_experts: bool, unfused_norms: bool = False) -> LayerBytes:
    """Return the bytes of a layer and a micro-batch on a rank.

    Args:
        model: its architecture.
        run: its configuration.
        has_experts: whether the layer has experts.
        unfused_norms: whether RMSNorm keeps its normalised input, too; see `Cluster.unfused_rms_norm`.
    """
    size = _sizes(model, run)
    hidden = size.hidden * size.item
    masks = 2 * size.hidden if model.hidden_dropout else 0.0
    norms = 0.0
    if unfused_norms and run.is_local and model.normalization == "RMSNorm":
        norms = 2 * hidden * (1 if size.item == 4 else 3)  # in 16 bits also its input in float32
    attention, core = attention_bytes(model, run)
    attention += _rotation_bytes(model, run)
    if has_experts:
        mlp, act = expert_bytes(model, run), 0.0
        width = model.expert_ffn * model.moe_router_topk + model.moe_shared_expert_intermediate_size
    else:
        mlp, act = mlp_bytes(model, run, model.ffn, size.tokens, size.tensor)
        width = model.ffn
    if run.fp8:  # the products keep their inputs in fp8
        hidden_inputs, mlp = size.hidden * size.item, mlp - act / 2
        whole = 4 * hidden - hidden_inputs + masks + norms + attention + mlp
    else:
        whole = 4 * hidden + masks + norms + attention + mlp
    gates = 2 if model.swiglu else 1
    working = size.item * (2 * size.hidden + size.whole + (1 + gates) * width * size.tokens / size.tensor)
    # Gradients of the outputs of row-parallel layers are gathered from sequence-parallel ranks before the backward.
    per_rank = model.query_size + 2 * model.key_size(size.tensor) + model.value_size + (1 + gates) * width
    deferred = size.item * (2 * size.hidden + 2 * size.whole + per_rank * size.tokens / size.tensor)
    if not fuses_softmax(model, run):
        # At the softmax's backward, the MLP's tensors are freed. With zero bubble, gradients take the place of those
        # that are, and the gradient of its output is kept.
        others = size.whole * size.item if run.zero_bubble else -mlp
        working = max(working, 3 * _scores(model, run) * 4 + others)
    modules = run.recompute_modules or ("core_attn",)
    if run.recompute_granularity == "selective":
        freed = {
            "core_attn": core,
            "layernorm": 2 * hidden,
            "moe_act": act,
            "mlp": mlp,
            "moe": mlp,
            "mla_up_proj": attention - core if model.multi_latent_attention else 0.0,
        }
        saved = sum(freed.get(module, 0.0) for module in set(modules))
        return LayerBytes(whole - saved, saved, working, deferred)
    if run.recompute_granularity == "full":
        kept = hidden / (size.tensor if run.distribute_saved_activations and not run.sequence_parallel else 1)
        return LayerBytes(kept, whole, working, deferred)
    return LayerBytes(whole, 0.0, working, deferred)


def packed_backward_bytes(model: Architecture, run: Configuration, documents: float) -> float:
    """Return the bytes of the temporary tensors in the backward of packed documents' attention, of a layer on a rank.

    Flash attention sums the gradients of queries in float32. Its kernel for packed documents writes whole tiles of 128
    rows, so this tensor has room for 128 more rows per document: [tokens + 128 * documents, heads, channels], with
    channels rounded up to a multiple of 32. A second one has a number per row and head (`mha_varlen_bwd` in
    csrc/flash_attn/flash_api.cpp of flash-attn 2, and PyTorch's copy of it). With fewer key heads than query heads, the
    gradients of keys and values exist once for every query head, too.

    Args:
        model: its architecture.
        run: its configuration.
        documents: of a micro-batch on a rank. Ranks of an all-to-all have all rows of their share of the heads: give
            the documents of the group over the ranks of its all-to-all.
    """
    size = _sizes(model, run)
    heads = model.num_attention_heads / size.tensor
    width = -(-model.channels // _QUERY_MULTIPLE) * _QUERY_MULTIPLE
    sums = 4.0 * (size.tokens + _TILE_ROWS * documents) * heads * (width + 1)
    grads = (2 * model.query_size + 2 * model.key_size(size.tensor)) * size.tokens / size.tensor  # of output, q, k, v
    if model.groups < model.num_attention_heads:
        grads += 2 * size.tokens * heads * model.channels
    return sums + size.item * (grads + size.hidden)


def full_layer_bytes(model: Architecture, run: Configuration, has_experts: bool, unfused_norms: bool = False) -> float:
    """Return the bytes that a layer keeps if it is not recomputed, of a micro-batch on a rank; see `layer_bytes`."""
    return layer_bytes(model, replace(run, recompute_granularity=""), has_experts, unfused_norms).kept


def loss_bytes(model: Architecture, run: Configuration) -> tuple[float, float]:
    """Return the bytes of the last norm and of the logits at the loss, for one micro-batch or one of its segments.

    The logits exist in the model's dtype, and in float32 as the softmax (forward) and its gradient (backward). Chunks
    of tokens keep one chunk's logits. After that, the gradient of the logits exists with that of the output layer.

    Returns:
        Bytes of the last norm, and bytes of the logits at their peak, on a rank of the last stage.
    """
    size = _sizes(model, run)
    norm = 3 * size.hidden * size.item / run.seq1f1b_splits
    tokens = size.tokens / run.seq1f1b_splits
    if run.cross_entropy_chunk_tokens:
        tokens = min(tokens, run.cross_entropy_chunk_tokens * run.micro_batch_size)
    rows = model.padded(size.tensor) / size.tensor
    per_logit = size.item + 4
    if run.cross_entropy_loss_fusion:
        per_logit = size.item + (8 if run.cross_entropy_fusion_impl == "native" else 0)
    at_loss = tokens * rows * per_logit
    at_product = tokens * rows * size.item + rows * model.hidden_size * size.item
    return norm, max(at_loss, at_product)


def deferred_head_bytes(model: Architecture, run: Configuration) -> float:
    """Return the bytes that the output layer keeps until its weight gradient, if that is computed later.

    These are its input and the gradient of the logits, of a micro-batch on a rank of the last stage.
    """
    size = _sizes(model, run)
    return size.item * (size.hidden + size.tokens * model.padded(size.tensor) / size.tensor)


def weight_grad_bytes(model: Architecture, run: Configuration) -> float:
    """Return the bytes of the placeholders of weight gradients that TransformerEngine keeps, one per shape of a layer.

    With --gradient-accumulation-fusion the products add to main_grad, and autograd gets these tensors instead.
    """
    if not run.gradient_accumulation_fusion or run.is_local:
        return 0.0
    tensor = run.tensor_model_parallel_size
    gates = 3 if model.swiglu else 2
    count = model.attention_params(tensor)
    if not model.num_experts or model.moe_layer_freq != 1:
        count += gates * model.hidden_size * model.ffn // tensor
    return float(count * run.element)


def scores_buffer_bytes(model: Architecture, run: Configuration) -> float:
    """Return the bytes of the global buffer into which upstream's local attention writes its scores."""
    if run.fused_attention or not run.is_local:
        return 0.0
    return _scores(model, run) * run.element
