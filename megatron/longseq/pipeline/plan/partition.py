"""Where a sequence is cut: even, balanced by what the segments cost, or given lengths.

Under the causal mask a later token sees more keys, so equal lengths are unequal work, and a pipeline waits for its
slowest segment. `balanced` equalises forward plus backward together; `paper_partition` is what the authors do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron.longseq.pipeline.plan.segment_cost import CostModel, Line, ModelShape, cells

TILE = 128  # tokens of an attention kernel's tile: lengths that are multiples of it waste no part of one
TOLERATED = 1.01  # slowest segment over the mean that alignment may cost before a finer one is taken


@dataclass(frozen=True, slots=True)
class Partition:
    """A sequence's segments.

    Attributes:
        name: "even", "balanced", "given" or "paper".
        lengths: tokens per segment, in order.
        align: every length is a multiple of it (a balanced one's last has what is left).
        imbalance: cost, forward plus backward, of the slowest segment over the mean.
    """

    name: str
    lengths: tuple[int, ...]
    align: int
    imbalance: float

    def __str__(self) -> str:
        lengths = ",".join(map(str, self.lengths))
        over = f"slowest segment {self.imbalance - 1:.1%} over the mean"
        return f"{self.name}: {lengths} (multiples of {self.align}, {over})"


def parse(text: str, model: CostModel, segments: int, *, multiple: int = 1, align: int | None = None) -> Partition:
    """Return the partition that a flag's text asks for.

    Args:
        text: "even", "balanced" or lengths "N1,N2,...".
        model: what tokens and cells cost; its shape says how long the sequence is.
        segments: segments per sequence K.
        multiple: every length must be a multiple of it, see `layout.length_multiple`.
        align: for "balanced", a multiple of `multiple` for the lengths; None chooses (see `balanced`).

    Raises:
        ValueError: text that is none of these, lengths that do not fit, or a sequence too short for so many segments.
    """
    if text == "even":
        return even(model, segments, multiple=multiple)
    if text == "balanced":
        return balanced(model, segments, multiple=multiple, align=align)
    try:
        lengths = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--seq1f1b-partition {text!r} is neither even nor balanced nor lengths such as 3072,1024"
        ) from None
    return given(model, lengths, segments, multiple=multiple)


def even(model: CostModel, segments: int, *, multiple: int = 1) -> Partition:
    """Return lengths as equal as `multiple` allows, the longer ones first (the early segments are the cheap ones)."""
    units = _units(model.shape.seq_length, segments, multiple)
    short, longer = divmod(units, segments)
    return _partition("even", model, [(short + (i < longer)) * multiple for i in range(segments)], multiple)


def given(model: CostModel, lengths: Sequence[int], segments: int, *, multiple: int = 1) -> Partition:
    """Return the user's own lengths, checked."""
    text, total = ",".join(map(str, lengths)), model.shape.seq_length
    if len(lengths) != segments:
        raise ValueError(
            f"--seq1f1b-partition {text}: {len(lengths)} lengths for --seq1f1b-splits {segments}; give one per segment"
        )
    for length in lengths:
        if length < 1 or length % multiple:
            raise ValueError(
                f"--seq1f1b-partition {text}: {length} is not a positive multiple of {multiple} "
                "(every segment is shared equally by context-parallel ranks, two chunks each, and under "
                "--sequence-parallel by tensor-parallel ones)"
            )
    if sum(lengths) != total:
        raise ValueError(
            f"--seq1f1b-partition {text}: the lengths sum to {sum(lengths)}, but --seq-length is {total}; "
            f"change one by {total - sum(lengths):+d}"
        )
    return _partition("given", model, lengths, multiple)


def balanced(model: CostModel, segments: int, *, multiple: int = 1, align: int | None = None) -> Partition:
    """Return lengths that cost the same, forward plus backward: the cumulative cost is cut at i/K of its total.

    The cost is the mean over the pipeline's stages, head included: one partition serves all stages. All but the last
    stage have one ratio of attention to products, so they would choose the same cuts (slightly later ones than these);
    the last has the head, linear in tokens, and alone would choose earlier ones. The mean lies between the two, near
    the many, and is independent of how layers are dealt to stages. (Weighing the head more or less than the mean
    moved the simulated bubble of the paper's models by 0.3 percentage points at most.)

    Without a window the cumulative cost is one quadratic, with a window a quadratic up to the window's length and
    another after it; each is inverted in closed form. The cuts are rounded to the nearest multiple of the alignment.

    Args:
        model: what tokens and cells cost.
        segments: segments per sequence K.
        multiple: every length must be a multiple of it.
        align: every length but the last is a multiple of it; None takes the lcm of `multiple` and 128, or where the
            slowest segment then costs over 1% more than the mean, that of `multiple` and the largest power of two
            with which it does not (where none is fine enough: `multiple` itself). The partition says which.

    Raises:
        ValueError: the sequence is too short, or not a multiple of `multiple`, or `align` is not one.
    """
    total = model.shape.seq_length
    _units(total, segments, multiple)
    if align is not None:
        if align < 1 or align % multiple:
            raise ValueError(f"an alignment of {align} tokens is not a positive multiple of {multiple}")
        if total // align < segments:
            raise ValueError(
                f"--seq-length {total} holds {total // align} pieces of {align} tokens, fewer than the "
                f"{segments} segments; lower --seq1f1b-splits or the alignment"
            )
        return _partition("balanced", model, _cut(model, segments, align), align)
    choices = [math.lcm(multiple, TILE >> i) for i in range(TILE.bit_length())]
    for choice in [choice for choice in dict.fromkeys(choices) if total // choice >= segments]:
        result = _partition("balanced", model, _cut(model, segments, choice), choice)
        if result.imbalance <= TOLERATED:
            return result
    return result


def paper_partition(shape: ModelShape, segments: int, multiple: int = 1) -> Partition:
    """Return the authors' partition: forward FLOPs alone, cut from the end, every length but the first rounded down.

    Their model counts a plain MLP, one key head per query head, three operations per softmax element, and both the
    embedding's lookup and the head as products of every stage.
    """
    heads, hidden, total = shape.num_attention_heads, shape.hidden_size, shape.seq_length
    _units(total, segments, multiple)
    cell = shape.num_layers * heads * (4 * shape.channels + 3)
    token = shape.num_layers * (8 * hidden * heads * shape.channels + 4 * hidden * shape.ffn)
    token += 4 * hidden * shape.padded_vocab_size
    share = (cell * total**2 / 2 + token * total) / segments
    lengths: list[int] = []
    for _ in range(segments - 1):
        end = total - sum(lengths)
        slope = token + cell * end  # share = slope * length - cell * length^2 / 2: the smaller root
        length = int((slope - math.sqrt(slope**2 - 2 * cell * share)) / cell) // multiple * multiple
        lengths.insert(0, length)
    lengths.insert(0, total - sum(lengths))
    forward = Line(cell, token)
    return Partition("paper", tuple(lengths), multiple, _imbalance(lengths, lambda a, b: forward(cells(a, b), b - a)))


def _units(total: int, segments: int, multiple: int) -> int:
    if segments < 1 or multiple < 1:
        raise ValueError(f"{segments} segments in multiples of {multiple}: both must be at least 1")
    if total % multiple:
        raise ValueError(
            f"--seq-length {total} is not a multiple of {multiple} (the ranks that share every segment); "
            f"the nearest that is: {round(total / multiple) * multiple}"
        )
    if total // multiple < segments:
        raise ValueError(
            f"--seq-length {total} cannot be cut into {segments} segments of at least {multiple} tokens; "
            f"lower --seq1f1b-splits to at most {total // multiple}"
        )
    return total // multiple


def _cut(model: CostModel, segments: int, align: int) -> list[int]:
    """Lengths between the real cuts, rounded to the nearest multiple of `align`, none of them empty."""
    total = model.shape.seq_length
    pieces, cuts = total // align, [0]
    for x in ideal_cuts(model, segments):
        earliest, latest = cuts[-1] // align + 1, pieces - (segments - len(cuts))
        cuts.append(min(max(round(x / align), earliest), latest) * align)
    return [b - a for a, b in zip(cuts, [*cuts[1:], total], strict=True)]


def ideal_cuts(model: CostModel, segments: int) -> list[float]:
    """Return the K - 1 real positions at which the cumulative cost, forward plus backward, reaches i/K of its total."""
    pieces = _cumulative(model)
    whole = _value(pieces[-1], model.shape.seq_length - pieces[-1][0])
    cuts = []
    for i in range(1, segments):
        target = whole * i / segments
        piece = next(p for p in reversed(pieces) if p[3] <= target)
        cuts.append(piece[0] + _root(piece, target))
    return cuts


# A piece of the cumulative cost: where it begins, and a, b, c of a * t^2 + b * t + c at t tokens after that.
_Piece = tuple[float, float, float, float]


def _cumulative(model: CostModel) -> list[_Piece]:
    """The cumulative cost of the first x tokens, as the sum over layers of `cells` and tokens with x made continuous.

    The cost per call is every segment's alike and moves no cut.
    """
    shape, layer, head = model.shape, model.layer, model.head
    cell = layer.forward.cell + layer.backward.cell
    token = shape.num_layers * (layer.forward.token + layer.backward.token) + head.forward.token + head.backward.token
    counts = shape.windows()
    quadratic = cell * shape.num_layers / 2
    first = (0.0, quadratic, quadratic + token, 0.0)
    if shape.window is None or shape.window + 1 >= shape.seq_length:
        return [first]
    width = shape.window + 1.0
    full, windowed = cell * counts.get(None, 0) / 2, cell * counts.get(shape.window, 0)
    return [first, (width, full, full * (2 * width + 1) + windowed * width + token, _value(first, width))]


def _value(piece: _Piece, t: float) -> float:
    _, a, b, c = piece
    return (a * t + b) * t + c


def _root(piece: _Piece, target: float) -> float:
    """The t >= 0 with a * t^2 + b * t + c = target, in the form that stays exact for small a."""
    _, a, b, c = piece
    return 2 * (target - c) / (b + math.sqrt(b * b + 4 * a * (target - c)))


def _partition(name: str, model: CostModel, lengths: Sequence[int], align: int) -> Partition:
    layer, head, counts = model.layer, model.head, model.shape.windows()

    def cost(begin: int, end: int) -> float:
        tokens = end - begin
        return sum(
            count * line(cells(begin, end, window), tokens)
            for window, count in counts.items()
            for line in (layer.forward, layer.backward)
        ) + sum(line(0, tokens) for line in (head.forward, head.backward))

    return Partition(name, tuple(lengths), align, _imbalance(lengths, cost))


def _imbalance(lengths: Sequence[int], cost: Callable[[int, int], float]) -> float:
    ends = list(accumulate(lengths))
    costs = [cost(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return max(costs) * len(costs) / sum(costs)
