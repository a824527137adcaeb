"""The cost of a segment: its forward, its backward, and the weight gradients within the backward.

A layer's cost is linear in the segment's tokens (matrix products) and in its cells, the (query, key) pairs that the
causal mask or a sliding window lets through (attention). The coefficients come from the model's shape, in FLOPs, or
from measurements of a real layer, in seconds (`fit`).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from pathlib import Path

from megatron.longseq.pipeline.plan.simulate import Costs

# Flash attention's forward has two matrix products; its backward recomputes one and has four more.
ATTENTION_BACKWARD = 2.5
# The backward of a matrix product is two products: for the gradients of the input and of the weight.
PRODUCT_BACKWARD = 2.0
_DEGENERATE = 1e-9  # determinant of the scaled normal equations below which the samples are collinear


def cells(begin: int, end: int, window: int | None = None) -> int:
    """Return the number of (query, key) pairs that the mask lets through for queries begin .. end - 1.

    Args:
        begin: position of the first query in the sequence.
        end: position after the last query.
        window: keys before its own that a query sees (the first number of upstream's --window-size); None: all.
    """
    return _visible(end, window) - _visible(begin, window)


def _visible(position: int, window: int | None) -> int:
    width = position if window is None else min(position, window + 1)
    return width * (width + 1) // 2 + (position - width) * width


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that determine its cost, with upstream's names and defaults.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        seq_length: tokens per sequence.
        padded_vocab_size: rows of the output layer; 0: no output layer.
        ffn_hidden_size: width of the MLP; 0: upstream's default, 4 * hidden (gated: 8/3 * hidden, floored to 64).
        num_query_groups: key and value heads; 0: one per query head.
        kv_channels: channels per head; 0: hidden_size // num_attention_heads.
        swiglu: whether the MLP is gated, with three products instead of two.
        moe_router_topk: experts per token, each as wide as the MLP.
        window: keys before its own that a query sees in layers with a window; None: no layer has one.
        windowed: whether each layer has the window; empty: all of them, if `window` is given.

    Raises:
        ValueError: a size is below 1, the query groups do not divide the heads, or `windowed` has another length.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    padded_vocab_size: int = 0
    ffn_hidden_size: int = 0
    num_query_groups: int = 0
    kv_channels: int = 0
    swiglu: bool = False
    moe_router_topk: int = 1
    window: int | None = None
    windowed: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "moe_router_topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"a model's {name} must be at least 1, not {getattr(self, name)}")
        for name in ("padded_vocab_size", "ffn_hidden_size", "num_query_groups", "kv_channels"):
            if getattr(self, name) < 0:
                raise ValueError(f"a model's {name} cannot be negative: {getattr(self, name)}")
        if not self.kv_channels and self.hidden_size < self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is too small for {self.num_attention_heads} heads; give kv_channels"
            )
        if self.num_attention_heads % self.groups:
            raise ValueError(
                f"num_query_groups {self.groups} does not divide num_attention_heads {self.num_attention_heads}"
            )
        if self.window is not None and self.window < 0:
            raise ValueError(
                f"window {self.window}: give the number of keys before the query, 0 or more, or None for all"
            )
        if self.windowed and (self.window is None or len(self.windowed) != self.num_layers):
            raise ValueError(
                f"a window pattern of {len(self.windowed)} layers needs a window and {self.num_layers} layers"
            )

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def channels(self) -> int:
        """Channels per head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn(self) -> int:
        """Width of the MLP."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return self.hidden_size * 8 // 3 // 64 * 64 if self.swiglu else 4 * self.hidden_size

    def windows(self, layers: range | None = None) -> dict[int | None, int]:
        """Return the number of layers with each window, of the given layers or of all."""
        layers = range(self.num_layers) if layers is None else layers
        counts: dict[int | None, int] = {}
        for layer in layers:
            window = self.window if not self.windowed or self.windowed[layer] else None
            counts[window] = counts.get(window, 0) + 1
        return counts


@dataclass(frozen=True, slots=True)
class Line:
    """A cost linear in a segment's cells and tokens, in FLOPs or seconds.

    Attributes:
        cell: per visible (query, key) pair.
        token: per token.
        call: per segment, whatever its length.
    """

    cell: float = 0.0
    token: float = 0.0
    call: float = 0.0

    def __call__(self, cells: float, tokens: float) -> float:
        """Return the cost of a segment."""
        return self.cell * cells + self.token * tokens + self.call


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The cost of one layer, or of the head.

    Attributes:
        forward: cost of the forward.
        backward: cost of the whole backward, for inputs and weights.
        weight: the part of `backward` that a zero-bubble schedule may run later.
    """

    forward: Line
    backward: Line
    weight: Line


@dataclass(frozen=True, slots=True)
class CostModel:
    """A model's shape, and the cost of a layer and of the head in one unit.

    Attributes:
        shape: sizes of the model.
        layer: cost of one layer, in FLOPs or in seconds.
        head: cost of the output layer, in the same unit.
    """

    shape: ModelShape
    layer: Coefficients
    head: Coefficients


@dataclass(frozen=True, slots=True)
class Sample:
    """Measured seconds of a layer's forward and whole backward for the queries begin .. end - 1.

    Attributes:
        begin: position of the first query.
        end: position after the last query.
        forward: seconds of the forward.
        backward: seconds of the whole backward.
    """

    begin: int
    end: int
    forward: float
    backward: float


def flops(shape: ModelShape, speed: float = 1.0) -> CostModel:
    """Return the cost of matrix products and attention in FLOPs, or in seconds with a `speed` in FLOPs per second.

    Norms, activation functions and the embedding are not counted. The head costs 2 * hidden * vocabulary per token in
    forward, on the last stage.

    Args:
        shape: sizes of the model.
        speed: FLOPs per second, for a cost in seconds; 1: a cost in FLOPs.
    """
    heads, hidden = shape.num_attention_heads * shape.channels, shape.hidden_size
    attention = 2 * hidden * (2 * heads + 2 * shape.groups * shape.channels)
    mlp = 2 * hidden * shape.ffn * (3 if shape.swiglu else 2) * shape.moe_router_topk
    layer = _from_forward(4.0 * heads / speed, (attention + mlp) / speed)
    return CostModel(shape, layer, _from_forward(0.0, 2.0 * hidden * shape.padded_vocab_size / speed))


def _from_forward(cell: float, token: float) -> Coefficients:
    backward = Line(ATTENTION_BACKWARD * cell, PRODUCT_BACKWARD * token)
    return Coefficients(Line(cell, token), backward, Line(token=token))


def read_samples(file: Path) -> list[Sample]:
    """Read measurements of a layer from a JSON list of [begin, end, forward seconds, backward seconds].

    Raises:
        ValueError: the file has other contents.
        OSError: the file cannot be read.
    """
    try:
        return [Sample(int(a), int(b), float(c), float(d)) for a, b, c, d in json.loads(file.read_text())]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file}: not a JSON list of [begin, end, forward seconds, backward seconds] ({error})"
        ) from error


def seconds(shape: ModelShape, layer: Coefficients) -> CostModel:
    """Return the cost in seconds for a measured layer; the head is assumed to run as fast as the layer's products.

    Args:
        shape: sizes of the model.
        layer: measured cost of a layer, in seconds.
    """
    counted = flops(shape)
    ratio = counted.head.forward.token / counted.layer.forward.token
    forward, backward, weight = layer.forward.token * ratio, layer.backward.token * ratio, layer.weight.token * ratio
    return CostModel(shape, layer, Coefficients(Line(token=forward), Line(token=backward), Line(token=weight)))


def segment_costs(
    model: CostModel, lengths: Sequence[int], stages: int, virtual: int = 1, layers: Sequence[int] | None = None
) -> Costs:
    """Return the costs of every model stage and segment, for the simulator.

    Args:
        model: the coefficients; their unit is the simulator's unit of time.
        lengths: tokens per segment.
        stages: pipeline ranks, P.
        virtual: virtual stages per rank, V; the head is on the last of the P * V model stages.
        layers: layers of each model stage; None: equal numbers, as upstream assigns them.

    Raises:
        ValueError: the lengths do not sum to the sequence, or the layers cannot be assigned so.
    """
    if sum(lengths) != model.shape.seq_length:
        raise ValueError(f"segments {list(lengths)} sum to {sum(lengths)} tokens, not to {model.shape.seq_length}")
    counts = _assign_layers(model.shape.num_layers, stages * virtual, layers)
    ends = list(accumulate(lengths))
    segments = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    forward, backward, weight = [], [], []
    for stage, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        own = model.shape.windows(range(end - count, end))
        head = model.head if stage == stages * virtual - 1 else None
        rows = [_stage_cost(model.layer, own, head, *segment) for segment in segments]
        forward.append(tuple(row[0] for row in rows))
        backward.append(tuple(row[1] - row[2] for row in rows))
        weight.append(tuple(row[2] for row in rows))
    return Costs(tuple(forward), tuple(backward), tuple(weight))


def _assign_layers(total: int, depth: int, layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        if total % depth:
            raise ValueError(
                f"{total} layers cannot be divided evenly among {depth} stages; change --num-layers, the stages or "
                "the virtual stages, or give the number of layers of each"
            )
        return [total // depth] * depth
    if len(layers) != depth or sum(layers) != total or min(layers) < 0:
        raise ValueError(f"layers per stage {list(layers)}: give {depth} numbers of at least 0 that sum to {total}")
    return list(layers)


def _stage_cost(
    layer: Coefficients, windows: dict[int | None, int], head: Coefficients | None, begin: int, end: int
) -> tuple[float, float, float]:
    """Return the cost of forward, whole backward and weight gradients of one segment on one stage."""
    totals = []
    for part in ("forward", "backward", "weight"):
        line: Line = getattr(layer, part)
        total = sum(count * line(cells(begin, end, window), end - begin) for window, count in windows.items())
        totals.append(total + (getattr(head, part)(0, end - begin) if head else 0.0))
    return totals[0], totals[1], totals[2]


def fit(samples: Sequence[Sample], window: int | None = None) -> Coefficients:
    """Fit the coefficients of a layer, in seconds, to measurements, by least squares of the relative error.

    No coefficient is negative. Weight gradients are assumed to be half of the products' backward.

    Args:
        samples: at least three; their cells and tokens must not be collinear.
        window: window of the measured layer, as in `cells`.

    Raises:
        ValueError: there are too few samples, a segment is empty, a time is not positive, or the samples are collinear.
    """
    for sample in samples:
        if not 0 <= sample.begin < sample.end:
            raise ValueError(f"sample {sample}: a segment needs 0 <= begin < end")
        if not all(math.isfinite(t) and t > 0 for t in (sample.forward, sample.backward)):
            raise ValueError(f"sample {sample}: a measured time must be finite and above 0; measure it again")
    points = [(cells(sample.begin, sample.end, window), sample.end - sample.begin) for sample in samples]
    if len(set(points)) < 3:
        raise ValueError(
            f"{len(set(points))} different segments do not determine three coefficients (per cell, per token, per "
            "call); measure at least 3 lengths, for instance 1/8, 1/4 and 1/2 of the sequence"
        )
    forward = _least_squares(points, [sample.forward for sample in samples])
    backward = _least_squares(points, [sample.backward for sample in samples])
    return Coefficients(forward, backward, Line(token=backward.token / PRODUCT_BACKWARD))


def _least_squares(points: Sequence[tuple[int, int]], times: Sequence[float]) -> Line:
    """Solve non-negative least squares: the best non-negative solution over all subsets of columns."""
    rows = [(cell / time, token / time, 1 / time) for (cell, token), time in zip(points, times, strict=True)]
    scale = [math.sqrt(sum(row[j] ** 2 for row in rows)) for j in range(3)]
    rows = [(a / scale[0], b / scale[1], c / scale[2]) for a, b, c in rows]
    best: tuple[float, list[float]] = (math.inf, [])
    for size in (3, 2, 1):
        for columns in combinations(range(3), size):
            solved = _solve([[row[j] for j in columns] for row in rows])
            if solved is None and size == 3:
                raise ValueError(
                    f"cells and tokens of the samples, {sorted(set(points))}, lie on one line, so attention and "
                    "linear layers cannot be separated; measure lengths that differ by factors of two"
                )
            if solved is None or min(solved) < 0:
                continue
            whole = [0.0, 0.0, 0.0]
            for j, value in zip(columns, solved, strict=True):
                whole[j] = value
            rest = sum((sum(x * y for x, y in zip(row, whole, strict=True)) - 1) ** 2 for row in rows)
            best = min(best, (rest, whole))
    return Line(*(value / unit for value, unit in zip(best[1], scale, strict=True)))


def _solve(rows: list[list[float]]) -> list[float] | None:
    """Solve rows @ x = 1 by the normal equations; None if they are degenerate. Columns have length 1."""
    n = len(rows[0])
    matrix = [
        [sum(row[i] * row[j] for row in rows) for j in range(n)] + [sum(row[i] for row in rows)] for i in range(n)
    ]
    determinant = 1.0
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(matrix[r][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        determinant *= matrix[i][i]
        if abs(determinant) < _DEGENERATE:
            return None
        for r in range(n):
            if r != i:
                factor = matrix[r][i] / matrix[i][i]
                matrix[r] = [x - factor * y for x, y in zip(matrix[r], matrix[i], strict=True)]
    return [matrix[i][n] / matrix[i][i] for i in range(n)]
