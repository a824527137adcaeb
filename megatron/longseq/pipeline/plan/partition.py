"""Cut a sequence into segments: of equal length, of equal cost, or of given lengths.

Under the causal mask later tokens see more keys. So segments of equal length cost unequally, and a pipeline waits for
its slowest segment. `balanced` equalises the cost of forward plus backward.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron.longseq.pipeline.plan.segment_cost import CostModel, cells

TILE = 128  # tokens of an attention kernel's tile; other lengths would leave a tile partly empty
TOLERATED = 1.01  # cost of the slowest segment over the mean, above which a finer alignment is taken


@dataclass(frozen=True, slots=True)
class Partition:
    """The segments of a sequence.

    Attributes:
        name: "even", "balanced", "given" or "paper".
        lengths: tokens per segment, in order.
        align: every length is a multiple of it, except the last one of a balanced partition.
        imbalance: cost of the slowest segment over the mean, forward plus backward.
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
    """Return the partition for the value of `--seq1f1b-partition`.

    Args:
        text: "even", "balanced" or lengths "N1,N2,...".
        model: costs of a token and of a cell; its shape has the length of the sequence.
        segments: segments per sequence, K.
        multiple: every length must be a multiple of it, see `layout.length_multiple`.
        align: for "balanced": alignment of the lengths, a multiple of `multiple`; None: see `balanced`.

    Raises:
        ValueError: the text is none of these, the lengths do not fit, or the sequence is too short.
    """
    if text == "even":
        return even(model, segments, multiple=multiple)
    if text == "balanced":
        return balanced(model, segments, multiple=multiple, align=align)
    try:
        lengths = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--seq1f1b-partition {text!r}: give even, balanced or lengths such as 3072,1024") from None
    return from_lengths(model, lengths, segments, multiple=multiple)


def even(model: CostModel, segments: int, *, multiple: int = 1) -> Partition:
    """Return lengths as equal as `multiple` allows, the longer ones first since early segments cost less.

    Args:
        model: costs of a token and of a cell; its shape has the length of the sequence.
        segments: segments per sequence, K.
        multiple: every length must be a multiple of it.

    Raises:
        ValueError: the sequence is not a multiple of `multiple`, or too short for so many segments.
    """
    units = check_length(model.shape.seq_length, segments, multiple)
    short, longer = divmod(units, segments)
    return _partition("even", model, [(short + (i < longer)) * multiple for i in range(segments)], multiple)


def from_lengths(model: CostModel, lengths: Sequence[int], segments: int, *, multiple: int = 1) -> Partition:
    """Return a partition of listed lengths after checking them.

    Args:
        model: costs of a token and of a cell.
        lengths: tokens per segment.
        segments: segments per sequence, K.
        multiple: every length must be a multiple of it.

    Raises:
        ValueError: the lengths are not K positive multiples of `multiple` that sum to the sequence.
    """
    text, total = ",".join(map(str, lengths)), model.shape.seq_length
    if len(lengths) != segments:
        raise ValueError(
            f"--seq1f1b-partition {text}: {len(lengths)} lengths for --seq1f1b-splits {segments}; give one per segment"
        )
    for length in lengths:
        if length < 1 or length % multiple:
            raise ValueError(
                f"--seq1f1b-partition {text}: {length} is not a positive multiple of {multiple} (each segment is "
                "divided into two chunks per context-parallel rank and, with --sequence-parallel, among the "
                "tensor-parallel ranks)"
            )
    if sum(lengths) != total:
        raise ValueError(
            f"--seq1f1b-partition {text}: the lengths sum to {sum(lengths)}, but --seq-length is {total}; "
            f"change one by {total - sum(lengths):+d}"
        )
    return _partition("given", model, lengths, multiple)


def balanced(model: CostModel, segments: int, *, multiple: int = 1, align: int | None = None) -> Partition:
    """Return lengths of equal cost, forward plus backward: cut i is where the cumulative cost is i/K of its total.

    One partition serves all stages, so the cost is the mean over the stages, with the head. All stages but the last
    have the same ratio of attention to matrix products and would choose slightly later cuts. The last stage also has
    the head, which is linear in tokens, and would choose earlier cuts. The mean does not depend on how layers are
    assigned to stages. (Other weights of the head changed the simulated bubble of the paper's models by at most 0.3
    percentage points.)

    Without a window the cumulative cost is one quadratic function; with a window it is one up to the window's length
    and another after it. Both are inverted in closed form, and cuts are rounded to the nearest multiple of the
    alignment.

    Args:
        model: costs of a token and of a cell.
        segments: segments per sequence, K.
        multiple: every length must be a multiple of it.
        align: every length but the last is a multiple of it. None: the lcm of `multiple` and 128 or, if the slowest
            segment then costs over 1% more than the mean, of `multiple` and the largest power of two that avoids this
            (if there is none: `multiple`). The partition tells the alignment.

    Raises:
        ValueError: the sequence is too short or not a multiple of `multiple`, or `align` is not a multiple of it.
    """
    total = model.shape.seq_length
    check_length(total, segments, multiple)
    if align is not None:
        if align < 1 or align % multiple:
            raise ValueError(f"an alignment of {align} tokens is not a positive multiple of {multiple}")
        if total // align < segments:
            raise ValueError(
                f"--seq-length {total} holds {total // align} blocks of {align} tokens, fewer than the {segments} "
                "segments; lower --seq1f1b-splits or the alignment"
            )
        return _partition("balanced", model, _cut(model, segments, align), align)
    choices = [math.lcm(multiple, TILE >> i) for i in range(TILE.bit_length())]
    for choice in [choice for choice in dict.fromkeys(choices) if total // choice >= segments]:
        result = _partition("balanced", model, _cut(model, segments, choice), choice)
        if result.imbalance <= TOLERATED:
            return result
    return result


def check_length(total: int, segments: int, multiple: int) -> int:
    """Check that a sequence can be cut; return its length in units of `multiple`.

    Args:
        total: tokens of the sequence.
        segments: segments per sequence, K.
        multiple: tokens that every segment's length is a multiple of.

    Raises:
        ValueError: the sequence is not a multiple of `multiple`, or too short for so many segments.
    """
    if segments < 1 or multiple < 1:
        raise ValueError(f"{segments} segments in multiples of {multiple}: both must be at least 1")
    if total % multiple:
        raise ValueError(
            f"--seq-length {total} is not a multiple of {multiple} (the ranks that share each segment); the nearest "
            f"multiple is {round(total / multiple) * multiple}"
        )
    if total // multiple < segments:
        raise ValueError(
            f"--seq-length {total} cannot be cut into {segments} segments of at least {multiple} tokens; "
            f"lower --seq1f1b-splits to at most {total // multiple}"
        )
    return total // multiple


def _cut(model: CostModel, segments: int, align: int) -> list[int]:
    """Return the lengths between the ideal cuts, rounded to the nearest multiple of `align`; none is empty."""
    total = model.shape.seq_length
    pieces, cuts = total // align, [0]
    for x in ideal_cuts(model, segments):
        earliest, latest = cuts[-1] // align + 1, pieces - (segments - len(cuts))
        cuts.append(min(max(round(x / align), earliest), latest) * align)
    return [b - a for a, b in zip(cuts, [*cuts[1:], total], strict=True)]


def ideal_cuts(model: CostModel, segments: int) -> list[float]:
    """Return the K - 1 real positions at which the cumulative cost, forward plus backward, reaches i/K of its total.

    Args:
        model: costs of a token and of a cell; its shape has the length of the sequence.
        segments: segments per sequence, K.

    Returns:
        Positions in tokens, ascending.
    """
    pieces = _cumulative(model)
    whole = _value(pieces[-1], model.shape.seq_length - pieces[-1][0])
    cuts = []
    for i in range(1, segments):
        target = whole * i / segments
        piece = next(p for p in reversed(pieces) if p[3] <= target)
        cuts.append(piece[0] + _root(piece, target))
    return cuts


def unit_costs(model: CostModel) -> tuple[float, float]:
    """Return the cost of a cell in one layer, and of a token in all layers and the head, forward plus backward.

    Returns:
        Cost of a cell and cost of a token, in the unit of the model's coefficients (FLOPs or seconds).
    """
    layer, head = model.layer, model.head
    token = layer.forward.token + layer.backward.token
    return (
        layer.forward.cell + layer.backward.cell,
        model.shape.num_layers * token + head.forward.token + head.backward.token,
    )


# A piece of the cumulative cost: its first position, and a, b, c of a * t^2 + b * t + c at t tokens after that.
_Piece = tuple[float, float, float, float]


def _cumulative(model: CostModel) -> list[_Piece]:
    """Return the cumulative cost of the first x tokens over all layers, for continuous x.

    The cost per call is the same for every segment and moves no cut.
    """
    shape, (cell, token) = model.shape, unit_costs(model)
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
    """Return the t >= 0 with a * t^2 + b * t + c = target, in a form that is exact for small a."""
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

    return Partition(name, tuple(lengths), align, imbalance_of(lengths, cost))


def imbalance_of(lengths: Sequence[int], cost: Callable[[int, int], float]) -> float:
    """Return the cost of the slowest segment over the mean.

    Args:
        lengths: tokens per segment.
        cost: function of a segment's begin and end, in tokens.
    """
    ends = list(accumulate(lengths))
    costs = [cost(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return max(costs) * len(costs) / sum(costs)
