"""Bytes that training keeps for backward, for whole sequences and for segments, under each kind of recomputation.

With segments, the keys and values of a layer are in a KV cache from a segment's forward to its backward, whatever is
recomputed. From the backward of a sequence's last segment on, every earlier segment also has gradients of its keys and
values, in float32, until its own backward. So segments with recomputation keep more than whole sequences, of which only
the layers' inputs are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.longseq.pipeline.plan.schedule import Action, ActionKind, Schedule
from megatron.longseq.pipeline.plan.segment_cost import ModelShape

LOSS_NUMBERS = 17  # bytes per token that chunks keep: maximum, sum of exponentials, label, whether it is a rank's own
GRANULARITIES = (None, "selective", "full")
METHODS = ("uniform", "block")


@dataclass(frozen=True, slots=True)
class Recompute:
    """Upstream's flags for recomputation.

    Attributes:
        granularity: None, "selective" (of core attention) or "full".
        method: of "full": "uniform" or "block".
        num_layers: of "full": layers per group (uniform), or recomputed layers per stage (block).

    Raises:
        ValueError: an unknown granularity or method, or no layer.
    """

    granularity: str | None = None
    method: str = "uniform"
    num_layers: int = 1

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES or self.method not in METHODS or self.num_layers < 1:
            raise ValueError(
                f"recomputation {self.granularity}, {self.method}, {self.num_layers} layers: the granularity must be "
                "selective or full; full needs the method uniform or block and at least 1 layer"
            )


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Bytes per token that the layers of a virtual stage keep.

    Attributes:
        activations: from forward to backward, without the KV cache.
        recomputing: in addition, while a backward recomputes activations.
        kv_cache: keys and values of all layers.
        kv_grads: gradients of keys and values that wait for their segment's backward.
        deferred: from backward to a weight gradient that is computed later (zero bubble), see `deferred_elements`.
        deferred_layer: the part of one layer.
        recomputes_first_layers: whether only the first layers are recomputed, after the others have finished backward.
    """

    activations: float
    recomputing: float
    kv_cache: float
    kv_grads: float
    deferred: float = 0.0
    deferred_layer: float = 0.0
    recomputes_first_layers: bool = False


def layer_elements(shape: ModelShape) -> float:
    """Return the elements per token that a layer keeps without recomputation, apart from keys and values.

    Norms keep their input and output, attention its queries and its output, the MLP the output of its first product and
    of the activation (with SwiGLU also of the gate). Flash attention keeps no scores.
    """
    queries = shape.num_attention_heads * shape.channels
    mlp = shape.ffn * (4 if shape.swiglu else 2) * shape.moe_router_topk
    return 4.0 * shape.hidden_size + 2.0 * queries + mlp


def deferred_elements(shape: ModelShape) -> float:
    """Return the elements per token that a layer keeps from its backward to its deferred weight gradients.

    These are the inputs of its four linear layers and the gradients of their outputs, whether or not the layer is
    recomputed.
    """
    queries, keys = shape.num_attention_heads * shape.channels, 2.0 * shape.groups * shape.channels
    mlp = shape.ffn * (3 if shape.swiglu else 2) * shape.moe_router_topk
    return 4.0 * shape.hidden_size + 2.0 * queries + keys + mlp


def stage_bytes(
    shape: ModelShape, layers: int, recompute: Recompute, *, in_segments: bool, element: int = 2
) -> StageBytes:
    """Return the bytes per token that the layers of a virtual stage keep.

    Args:
        shape: shape of the model.
        layers: layers of the virtual stage.
        recompute: what is recomputed.
        in_segments: whether keys and values are in a KV cache.
        element: bytes per element of the model's dtype.
    """
    keys = 2.0 * shape.groups * shape.channels
    queries = shape.num_attention_heads * shape.channels
    # The values of a whole sequence are a view of the tensor that holds queries, keys and values.
    whole = layer_elements(shape) + (0.0 if in_segments else queries + 1.5 * keys)
    if recompute.granularity == "full":
        again = layers if recompute.method == "uniform" else min(recompute.num_layers, layers)
        group = min(recompute.num_layers if recompute.method == "uniform" else 1, layers)
        groups = -(-again // group)
        activations = groups * shape.hidden_size + (layers - again) * whole
        recomputing = group * whole
    else:
        # Core attention's inputs are kept for its recomputation: the queries, as a view of that tensor.
        further = queries + keys if recompute.granularity == "selective" and in_segments else 0.0
        activations, recomputing = layers * (whole + further), 0.0
    stored = layers * keys if in_segments else 0.0
    first_layers = recompute.granularity == "full" and recompute.method == "block" and recompute.num_layers < layers
    grads = stored * max(element, 4)
    deferred = deferred_elements(shape) * element
    return StageBytes(
        activations * element,
        recomputing * element,
        stored * element,
        grads,
        deferred=layers * deferred,
        deferred_layer=deferred,
        recomputes_first_layers=first_layers,
    )


def head_bytes(shape: ModelShape, element: int = 2, *, chunked: bool = False) -> float:
    """Return the bytes per token that the output layer and the loss keep: their input and the float32 softmax.

    A model without an output layer keeps 0.

    Args:
        shape: shape of the model.
        element: bytes per element of the model's dtype.
        chunked: whether the loss is computed in chunks (--cross-entropy-chunk-tokens), which keep no softmax.
    """
    if not shape.padded_vocab_size:
        return 0.0
    return 2.0 * shape.hidden_size * element + (LOSS_NUMBERS if chunked else 4.0 * shape.padded_vocab_size)


def deferred_head_bytes(shape: ModelShape, element: int = 2) -> float:
    """Return the bytes per token that an output layer keeps until its weight gradient: input and gradient of logits.

    A loss in chunks computes this gradient in its backward and keeps nothing.
    """
    return (shape.hidden_size + shape.padded_vocab_size) * element if shape.padded_vocab_size else 0.0


def chunk_bytes(shape: ModelShape, tokens: int, element: int = 2) -> float:
    """Return the bytes of a chunk's logits and of their float32 copy, which exist while the chunk is computed.

    Args:
        shape: sizes of the model.
        tokens: tokens of the chunk.
        element: bytes per element of the model's dtype.
    """
    return tokens * shape.padded_vocab_size * (element + (4.0 if element < 4 else 0.0))


def peak_bytes(
    schedule: Schedule,
    lengths: Sequence[int],
    per_stage: Sequence[StageBytes],
    head: float = 0.0,
    chunk: float = 0.0,
    deferred_head: float = 0.0,
) -> list[float]:
    """Return the peak of the bytes that each rank keeps for backward, with one sequence per micro-batch.

    Args:
        schedule: a validated schedule.
        lengths: tokens per segment.
        per_stage: bytes per token of each model stage.
        head: bytes per token that the output layer and the loss keep on the last stage.
        chunk: bytes that they need there while they run (`chunk_bytes`).
        deferred_head: bytes per token that a deferred weight gradient of the output layer needs, see
            `deferred_head_bytes`.
    """
    pipeline = schedule.pipeline
    peaks = []
    for rank, order in enumerate(schedule.orders):
        own = [per_stage[pipeline.stage(rank, vstage)] for vstage in range(pipeline.virtual)]
        ends = [pipeline.stage(rank, vstage) == pipeline.depth - 1 for vstage in range(pipeline.virtual)]
        heads = [(head * is_last, chunk * is_last, deferred_head * is_last) for is_last in ends]
        peaks.append(max(_alive(order, lengths, own, heads, schedule.splits_weights), default=0.0))
    return peaks


def _alive(
    order: Sequence[Action],
    lengths: Sequence[int],
    own: Sequence[StageBytes],
    heads: Sequence[tuple[float, float, float]],
    splits_weights: bool,
) -> Iterator[float]:
    """Yield the bytes kept after each action, and at the peaks within each backward."""
    alive = 0.0
    for action in order:
        tokens, here = lengths[action.segment], own[action.vstage]
        (per_token, chunk, deferred_head), unit = heads[action.vstage], tokens * here.activations
        loss = tokens * per_token
        deferred = tokens * (here.deferred + deferred_head) if splits_weights else 0.0
        before, is_first = sum(lengths[: action.segment]), action.segment == len(lengths) - 1
        if action.kind is ActionKind.FORWARD:
            alive += unit + loss + tokens * here.kv_cache
            yield alive + chunk
        elif action.kind is ActionKind.BACKWARD:
            yield alive + chunk
            alive -= loss
            yield alive + tokens * here.recomputing * (not here.recomputes_first_layers)  # the last layer's backward
            alive += before * here.kv_grads if is_first else 0.0
            alive += deferred - unit - tokens * here.kv_cache
            own_deferred = tokens * here.deferred_layer if splits_weights else 0.0  # is not kept yet
            yield alive - own_deferred + tokens * here.recomputing  # the first layer's
            alive -= 0.0 if is_first else tokens * here.kv_grads
        else:
            alive -= deferred
        yield alive
