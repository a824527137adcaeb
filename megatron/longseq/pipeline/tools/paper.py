"""Tables of the paper's configurations: the simulation of every schedule beside the published figures.

Published figures are those of arXiv 2406.03488 and of the figures and tables in its authors' repository.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.longseq.pipeline.plan.segment_cost import Coefficients, Line, ModelShape, flops
from megatron.longseq.pipeline.tools.compare import PipelineSetup, Result, ScheduleChoice, attempt


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration of the paper.

    Attributes:
        model: the paper's name of the model.
        seq_length: tokens per sequence.
        microbatches: micro-batches per step, M.
        memory: published peak memory in GB per device of 1F1B, 1F1B-I, Seq1F1B, Seq1F1B-I; None: out of memory.
        speed: published TFLOP/s per device of the same schedules; None: out of memory; empty: not published.
    """

    model: str
    seq_length: int
    microbatches: int
    memory: tuple[float | None, ...]
    speed: tuple[float | None, ...] = ()


# Per model: pipeline stages, tensor-parallel size, and the shape at 16k (attention without groups, a plain MLP).
MODELS = {
    "2.7B": (8, 1, ModelShape(32, 2560, 32, 16384, padded_vocab_size=50304)),
    "7B": (4, 8, ModelShape(32, 4096, 32, 16384, padded_vocab_size=51200)),
    "13B": (4, 8, ModelShape(40, 5120, 40, 16384, padded_vocab_size=51200)),
    "30B": (8, 8, ModelShape(64, 6144, 64, 16384, padded_vocab_size=51200)),
}
K = 1024
FREE = Coefficients(Line(), Line(), Line())
ROWS = (
    Row("2.7B", 16 * K, 16, (51.4, 70.95, 29.85, 29.7)),
    Row("2.7B", 24 * K, 16, (74.3, None, 41.45, 41.9)),
    Row("2.7B", 32 * K, 16, (None, None, 53.1, 54.45)),
    Row("7B", 32 * K, 8, (28.0, 34.2, 18.9, 16.35), (99.67, 109.55, 110.62, 97.69)),
    Row("7B", 32 * K, 16, (28.0, 34.2, 18.9, 16.35), (114.45, 116.46, 115.34, 95.55)),
    Row("7B", 64 * K, 8, (51.4, 62.9, 34.3, 28.45), (107.49, 119.96, 124.62, 117.75)),
    Row("7B", 64 * K, 16, (51.4, 62.9, 34.3, 28.45), (123.95, 128.70, 123.05, 117.98)),
    Row("7B", 128 * K, 8, (None, None, 69.8, 57.55), (None, None, 136.72, 135.06)),
    Row("7B", 128 * K, 16, (None, None, 69.8, 57.55), (None, None, 142.08, 136.58)),
    Row("13B", 32 * K, 16, (44.2, 53.25, 29.7, 25.8)),
    Row("13B", 48 * K, 16, (64.3, 76.45, 42.35, 35.9)),
    Row("13B", 64 * K, 16, (66.85, None, 51.6, 42.95)),
    Row("30B", 32 * K, 16, (71.4, None, 37.6, 38.65)),
    Row("30B", 48 * K, 16, (None, None, 54.7, 55.55)),
    Row("30B", 64 * K, 16, (None, None, 67.5, 66.9)),
    Row("30B", 64 * K, 32, (None, None, 67.5, 66.9)),
)

ONE, ONE_I, PAPER, PAPER_I = (
    ScheduleChoice(),
    ScheduleChoice(virtual=2),
    ScheduleChoice(4, "paper"),
    ScheduleChoice(4, "paper", virtual=2),
)
OURS = ScheduleChoice(4, "balanced")
COLUMNS = {
    "1F1B": ONE,
    "1F1B-I V=2": ONE_I,
    "Seq1F1B even": ScheduleChoice(4),
    "Seq1F1B, authors'": PAPER,
    "balanced": OURS,
    "balanced, slack 1": replace(OURS, slack=1),
    "balanced, zero-bubble": replace(OURS, zero_bubble=True),
    "balanced, zero-bubble, slack 1": replace(OURS, zero_bubble=True, slack=1),
    "balanced, V=2": replace(OURS, virtual=2),
    "balanced, K=8": replace(OURS, segments=8),
}
HALF = (
    PAPER,
    OURS,
    *(replace(OURS, slack=slack) for slack in (1, 2)),
    *(replace(OURS, zero_bubble=True, slack=slack) for slack in (0, 1)),
    *(replace(OURS, virtual=virtual) for virtual in (2, 4, 8)),
    replace(OURS, segments=8),
    replace(OURS, segments=8, slack=1),
    *(replace(OURS, segments=8, zero_bubble=True, slack=slack) for slack in (0, 1)),
    *(replace(OURS, segments=8, virtual=virtual) for virtual in (2, 4, 8)),
)


@functools.cache  # the simulations take ten seconds
def markdown() -> str:
    """Return the tables of the documentation: all schedules, published beside simulated, and the way to half."""
    return "\n\n".join((_schedules(), _published(), _half(32), _half(16)))


def _simulate(row: Row, choices: Sequence[ScheduleChoice], head: bool = True) -> list[Result | str]:
    stages, tensor_parallel, shape = MODELS[row.model]
    model = flops(replace(shape, seq_length=row.seq_length))
    if not head:
        model = replace(model, head=FREE)
    return attempt(choices, model, PipelineSetup(stages, row.microbatches, tensor_parallel))


def _place(row: Row) -> str:
    stages, tensor_parallel, _ = MODELS[row.model]
    return f"{row.model} {row.seq_length // K}k, P={stages} TP={tensor_parallel} M={row.microbatches}"


def _schedules() -> str:
    lines = [
        "Simulated bubble, and sequences alive on the fullest rank (K=4 where not said; the head is on the last stage; "
        "its share is a floor that no order removes):",
        "",
        f"| configuration | floor | {' | '.join(COLUMNS)} |",
        "|---|--:|" + "--:|" * len(COLUMNS),
    ]
    for row in ROWS:
        results = _simulate(row, list(COLUMNS.values()))
        cells = [f"{r.timeline.bubble:.1%}, {r.sequences:.2f}" if isinstance(r, Result) else "-" for r in results]
        floor = next(r.floor for r in results if isinstance(r, Result))
        lines.append(f"| {_place(row)} | {floor:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _published() -> str:
    lines = [
        "Ratios to 1F1B: published (measured by the authors; memory is the whole device's) and simulated (no cost of "
        "splitting or of messages; memory is activations alone):",
        "",
        "| configuration | throughput Seq1F1B, published | simulated | throughput Seq1F1B-I, published | simulated "
        "| memory Seq1F1B, published | simulated | memory Seq1F1B-I, published | simulated |",
        "|---|" + "--:|" * 8,
    ]
    for row in ROWS:
        one, seq, interleaved = _simulate(row, (ONE, PAPER, PAPER_I))
        if not isinstance(one, Result):
            raise ValueError(f"{_place(row)}: {one}")
        cells = []
        for position, result in ((2, seq), (3, interleaved)):
            faster = one.timeline.makespan / result.timeline.makespan if isinstance(result, Result) else None
            cells += [_ratio(row.speed, position), _times(faster)]
        for position, result in ((2, seq), (3, interleaved)):
            less = result.sequences / one.sequences if isinstance(result, Result) else None
            cells += [_ratio(row.memory, position), _times(less)]
        lines.append(f"| {_place(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(published: tuple[float | None, ...], position: int) -> str:
    if not published:
        return ""
    one, other = published[0], published[position]
    return "1F1B out of memory" if one is None else _times(other / one if other is not None else None)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _half(microbatches: int) -> str:
    row = next(row for row in ROWS if (row.model, row.seq_length, row.microbatches) == ("30B", 64 * K, microbatches))
    lines = [
        f"The way to half of Seq1F1B's own bubble, {_place(row)} (bold: at most half of the authors' in that column; "
        "without the head: as if it cost nothing):",
        "",
        "| schedule | bubble | bubble without the head | sequences | of the authors' |",
        "|---|--:|--:|--:|--:|",
    ]
    pairs = list(zip(_simulate(row, HALF), _simulate(row, HALF, head=False), strict=True))
    for result, bare in pairs:
        if isinstance(result, str) or isinstance(bare, str):
            lines.append(f"| {result.split(':')[0] if isinstance(result, str) else result.choice} | - | - | - | - |")
            continue
        own, own_bare = pairs[0]
        if isinstance(own, str) or isinstance(own_bare, str):
            raise ValueError(f"{_place(row)}: {own}")
        cells = [
            _bold(result.timeline.bubble, own.timeline.bubble),
            _bold(bare.timeline.bubble, own_bare.timeline.bubble),
            f"{result.sequences:.2f}",
            _times(result.sequences / own.sequences),
        ]
        lines.append(f"| {result.choice} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bold(bubble: float, own: float) -> str:
    return f"**{bubble:.1%}**" if bubble <= own / 2 else f"{bubble:.1%}"
