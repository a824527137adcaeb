"""The method in one picture: which rank holds what, two links over time, and what every strategy holds and sends."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot
from matplotlib.patches import Patch, Rectangle

from megatron.longseq.sharding.plan.collectives import Scope
from megatron.longseq.sharding.tools.picture import BUCKETS, LINKS, NODES, STATES, Holding, Scene, Timeline

SUFFIXES = (".svg", ".png")
# Okabe and Ito's colours: told apart by every kind of colour vision.
STATE_COLOURS = ("#0072B2", "#E69F00", "#009E73")
BUCKET_COLOURS = ("#0072B2", "#56B4E9", "#CC79A7", "#D55E00")
_EMPTY, _SENT = "#EFEFEF", "#999999"
_WIDE, _TALL = 12.0, 6.6  # inches
_TITLE: dict[str, Any] = {"loc": "left", "fontweight": "bold", "fontsize": 9.5, "pad": 5}
_ROWS = {Scope.INSIDE: 0, Scope.BETWEEN: 1}
_BAR = 0.8


def draw(scene: Scene, file: Path) -> None:
    """Write the picture, as SVG or PNG by the file's suffix.

    Raises:
        ValueError: another suffix.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: a picture is written as {' or '.join(SUFFIXES)}, not {file.suffix or 'no suffix'}")
    style: Any = {"font.size": 8.5, "svg.hashsalt": "longseq", "svg.fonttype": "none"}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(_WIDE, _TALL))
        count = len(scene.holdings)
        for index, holding in enumerate(scene.holdings):
            box = (0.065 + index * 0.935 / count, 0.735, 0.935 / count - 0.025, 0.20)
            _holding(_axes(figure, box), scene, holding, is_first=index == 0)
        latest = max(timeline.end for timeline in scene.timelines)
        for index, timeline in enumerate(scene.timelines):
            _timeline(_axes(figure, (0.065, 0.475 - index * 0.19, 0.40, 0.115)), scene, timeline, latest)
        _costs(figure, scene)
        _legends(figure, scene)
        figure.savefig(file, dpi=140, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


def _axes(figure: Any, box: tuple[float, float, float, float]) -> Any:
    axes = figure.add_axes(box)
    axes.tick_params(length=0, labelsize=7.5)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _holding(axes: Any, scene: Scene, holding: Holding, *, is_first: bool) -> None:
    """Rows are states, columns ranks; a column is as wide as a whole buffer."""
    groups = scene.groups
    starts = [rank * 1.12 + rank // groups.size * 0.18 for rank in range(groups.ranks)]
    for row, (state, ranks) in enumerate(zip(STATES, holding.states, strict=True)):
        for rank, held in enumerate(ranks):
            axes.add_patch(Rectangle((starts[rank], row), 1, _BAR, facecolor=_EMPTY, linewidth=0))
            begin, width = held.start / groups.ranks, len(held) / groups.ranks
            name = f"held-{holding.strategy}-{state.split()[0]}-{rank}-{held.start}-{held.stop}"
            corner = (starts[rank] + begin, row)
            axes.add_patch(Rectangle(corner, width, _BAR, facecolor=STATE_COLOURS[row], linewidth=0, gid=name))
    axes.set_xlim(0, starts[-1] + 1)
    axes.set_ylim(len(STATES), -0.2)
    axes.set_xticks([start + 0.5 for start in starts], [f"rank {rank}" for rank in range(groups.ranks)])
    names = [state.replace("optimizer states", "optimizer\nstates") for state in STATES]
    axes.set_yticks([row + _BAR / 2 for row in range(len(STATES))], names if is_first else [""] * len(STATES))
    axes.set_title(f"--paro {holding.strategy}", **_TITLE)
    axes.set_xlabel(f"{groups.count} groups of {groups.size} ranks", fontsize=7.5, labelpad=2)


def _timeline(axes: Any, scene: Scene, timeline: Timeline, latest: float) -> None:
    """Rows are links; a flat collective keeps both, and serial ones leave one idle."""
    for row in _ROWS.values():
        axes.add_patch(Rectangle((0, row), latest * 1e3, _BAR, facecolor=_EMPTY, linewidth=0))
    for run, begin, end in timeline.spans:
        name = f"time-{timeline.mode}-{run.bucket}-{run.turn}-{run.phase.scope}"
        top, height = (0, 1 + _BAR) if run.phase.scope is Scope.FLAT else (_ROWS[run.phase.scope], _BAR)
        colour = BUCKET_COLOURS[run.bucket]
        box = Rectangle((begin * 1e3, top), (end - begin) * 1e3, height, facecolor=colour, edgecolor="white", gid=name)
        axes.add_patch(box)
    axes.set_xlim(0, latest * 1e3)
    axes.set_ylim(2, -0.05)
    axes.set_yticks([row + _BAR / 2 for row in _ROWS.values()], ["inside", "between"])
    is_last = timeline.mode is scene.timelines[-1].mode
    axes.set_xticks(range(int(latest * 1e3) + 1), None if is_last else [""] * (int(latest * 1e3) + 1))
    axes.set_xlabel("milliseconds" if is_last else "", fontsize=7.5, labelpad=1)
    axes.set_title(f"{timeline.mode}: {timeline.end * 1e3:.2f} ms", **{**_TITLE, "pad": 3})


def _costs(figure: Any, scene: Scene) -> None:
    """A row for every strategy."""
    rows = [_BAR / 2 + row for row in range(len(scene.costs))]
    held = _bars(figure, (0.555, 0.22), "GB on a rank", [cost.held.total for cost in scene.costs])
    held.set_yticks(rows, [str(cost.strategy) for cost in scene.costs])
    for row, cost in enumerate(scene.costs):
        start = 0.0
        for state, size, colour in zip(STATES, cost.held, STATE_COLOURS, strict=False):
            name = f"cost-{cost.strategy}-{state.split()[0]}"
            held.add_patch(Rectangle((start, row), size / 1e9, _BAR, facecolor=colour, linewidth=0, gid=name))
            start += size / 1e9
    for place, scope in ((0.790, Scope.INSIDE), (0.900, Scope.BETWEEN)):
        sizes = [getattr(cost.sent, scope) for cost in scene.costs]
        axes = _bars(figure, (place, 0.08), f"GB sent {scope}" if scope is Scope.INSIDE else str(scope), sizes)
        for row, (cost, size) in enumerate(zip(scene.costs, sizes, strict=True)):
            name = f"cost-{cost.strategy}-{scope}"
            axes.add_patch(Rectangle((0, row), size / 1e9, _BAR, facecolor=_SENT, linewidth=0, gid=name))


def _bars(figure: Any, place: tuple[float, float], title: str, sizes: list[int]) -> Any:
    """Return axes for a bar a row, with the bars' numbers of bytes in them."""
    axes, widest = _axes(figure, (place[0], 0.095, place[1], 0.495)), max(sizes) / 1e9
    for row, size in enumerate(sizes):
        axes.text(size / 1e9 + widest * 0.02, row + _BAR / 2, f"{size / 1e9:.3g}", va="center", fontsize=7.5)
    axes.set_xlim(0, widest * 1.25)
    axes.set_ylim(len(sizes), -0.2)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, **_TITLE)
    return axes


def _legends(figure: Any, scene: Scene) -> None:
    words: dict[str, Any] = {"fontsize": 8, "frameon": False, "borderaxespad": 0, "borderpad": 0, "handlelength": 1.2}
    size, gigabytes = sum(BUCKETS) / 1e6, (LINKS.inside.bandwidth / 1e9, LINKS.between.bandwidth / 1e9)
    text = (
        f"{scene.kind} of {size:g} MB in {len(BUCKETS)} buckets, {NODES.count} groups of {NODES.size}, "
        f"{gigabytes[0]:g} GB/s inside, {gigabytes[1]:g} between: simulated"
    )
    figure.text(0.065, 0.648, text, fontsize=7.5)
    job = scene.job
    text = (
        f"{job.model.params / 1e9:.3g} billion parameters, {job.groups.count} groups of {job.groups.size}, a step of "
        f"{job.work.microbatches} micro-batches: by formula"
    )
    figure.text(0.555, 0.648, text, fontsize=7.5)
    buckets = [Patch(facecolor=colour, label=f"bucket {index}") for index, colour in enumerate(BUCKET_COLOURS)]
    figure.legend(
        handles=[*buckets, Patch(facecolor=_EMPTY, label="idle")],
        loc="lower left",
        ncols=5,
        bbox_to_anchor=(0.065, 0.012),
        **words,
    )
    states = [Patch(facecolor=colour, label=state) for colour, state in zip(STATE_COLOURS, STATES, strict=True)]
    figure.legend(
        handles=[*states, Patch(facecolor=_SENT, label="sent")],
        loc="lower left",
        ncols=4,
        bbox_to_anchor=(0.555, 0.012),
        **words,
    )
