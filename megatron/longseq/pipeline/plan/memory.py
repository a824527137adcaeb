"""Bytes that training keeps for backward: of whole sequences and of segments, under each of upstream's recomputations.

Per token, a layer keeps activations, and with segments its keys and values lie in the store: they live from a segment's
forward to its backward, whatever is recomputed. From the last segment's backward on, every earlier segment has
gradients of its keys and values, in float32, until its own backward. So recomputation leaves segments more to keep than
whole sequences, of which it keeps a layer's input alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.longseq.pipeline.plan.schedule import Action, Kind, Schedule
from megatron.longseq.pipeline.plan.segment_cost import ModelShape

GRANULARITIES = (None, "selective", "full")
METHODS = ("uniform", "block")


@dataclass(frozen=True, slots=True)
class Recompute:
    """Upstream's flags of recomputation.

    Attributes:
        granularity: None, "selective" (of core attention) or "full".
        method: of "full": "uniform" or "block".
        num_layers: of "full": layers per group (uniform), or recomputed layers per stage (block).

    Raises:
        ValueError: another granularity or method, or no layer.
    """

    granularity: str | None = None
    method: str = "uniform"
    num_layers: int = 1

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES or self.method not in METHODS or self.num_layers < 1:
            raise ValueError(
                f"recomputation {self.granularity}, {self.method}, {self.num_layers} layers: upstream has selective or "
                "full, and for full uniform or block, and at least one layer"
            )


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes per token of the layers of a virtual stage.

    Attributes:
        waiting: from forward to backward, keys and values in a store apart.
        running: once, in addition, while a backward computes activations again.
        ends_running: this happens in the first layers alone, when those after them are done.
        keys: keys and values of all layers, in a store.
        gradients: of these, while they wait for their segment's backward.
    """

    waiting: float
    running: float
    keys: float
    gradients: float
    ends_running: bool = False


def layer_elements(shape: ModelShape) -> float:
    """Return what a layer keeps per token without recomputation, keys and values left out, in elements.

    Norms keep input and output; attention its queries and its output; the MLP its first product, and the activation's
    output (gated: the gate's, too). Flash attention keeps no scores.
    """
    queries = shape.num_attention_heads * shape.channels
    mlp = shape.ffn * (4 if shape.swiglu else 2) * shape.moe_router_topk
    return 4.0 * shape.hidden_size + 2.0 * queries + mlp


def kept(shape: ModelShape, layers: int, recompute: Recompute, *, in_segments: bool, element: int = 2) -> Kept:
    """Return what the layers of a virtual stage keep per token.

    Args:
        shape: of the model.
        layers: of the virtual stage.
        recompute: what is recomputed.
        in_segments: keys and values lie in a store.
        element: bytes of an element of the model's type.
    """
    keys = 2.0 * shape.groups * shape.channels
    queries = shape.num_attention_heads * shape.channels
    # A whole sequence's values stay in the tensor that queries, keys and values were cut from.
    whole = layer_elements(shape) + (0.0 if in_segments else queries + 1.5 * keys)
    if recompute.granularity == "full":
        again = layers if recompute.method == "uniform" else min(recompute.num_layers, layers)
        group = min(recompute.num_layers if recompute.method == "uniform" else 1, layers)
        groups = -(-again // group)
        waiting = groups * shape.hidden_size + (layers - again) * whole
        running = group * whole
    else:
        # Core attention's inputs stay for its second run: the queries and, in the tensor that they were cut from, all.
        further = queries + keys if recompute.granularity == "selective" and in_segments else 0.0
        waiting, running = layers * (whole + further), 0.0
    stored = layers * keys if in_segments else 0.0
    ends = recompute.granularity == "full" and recompute.method == "block" and recompute.num_layers < layers
    return Kept(waiting * element, running * element, stored * element, stored * max(element, 4), ends)


def head_bytes(shape: ModelShape, element: int = 2) -> float:
    """Return what the output layer and the loss keep per token: the layer's input, and the shares of the vocabulary in
    float32. Without an output layer 0.
    """
    if not shape.padded_vocab_size:
        return 0.0
    return 2.0 * shape.hidden_size * element + 4.0 * shape.padded_vocab_size


def peak_bytes(schedule: Schedule, lengths: Sequence[int], per_stage: Sequence[Kept], head: float = 0.0) -> list[float]:
    """Return per rank the most bytes kept for backward at once, of one sequence per micro-batch.

    Args:
        schedule: what every rank does.
        lengths: tokens per segment.
        per_stage: what each model stage keeps per token.
        head: bytes per token that the last stage's output layer and loss keep.
    """
    pipeline = schedule.pipeline
    peaks = []
    for rank, order in enumerate(schedule.orders):
        own = [per_stage[pipeline.stage(rank, vstage)] for vstage in range(pipeline.virtual)]
        heads = [head * (pipeline.stage(rank, vstage) == pipeline.depth - 1) for vstage in range(pipeline.virtual)]
        peaks.append(max(_alive(order, lengths, own, heads, schedule.splits_weights), default=0.0))
    return peaks


def _alive(
    order: Sequence[Action], lengths: Sequence[int], own: Sequence[Kept], heads: Sequence[float], splits_weights: bool
) -> Iterator[float]:
    """Yield what is alive after each action, and at the worst moments of each backward."""
    alive = 0.0
    for action in order:
        tokens, here = lengths[action.segment], own[action.vstage]
        unit, loss = tokens * here.waiting, tokens * heads[action.vstage]
        before, is_first = sum(lengths[: action.segment]), action.segment == len(lengths) - 1
        if action.kind is Kind.FORWARD:
            alive += unit + loss + tokens * here.keys
        elif action.kind is Kind.BACKWARD:
            alive -= loss
            yield alive + tokens * here.running * (not here.ends_running)  # the last layer's backward
            alive += before * here.gradients if is_first else 0.0
            yield alive - unit - tokens * here.keys + tokens * here.running  # the first layer's
            alive -= tokens * here.keys + (0.0 if splits_weights else unit)
            alive -= 0.0 if is_first else tokens * here.gradients
        else:
            alive -= unit
        yield alive
