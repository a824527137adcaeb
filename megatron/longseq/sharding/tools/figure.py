"""The method in one figure: which rank keeps what, two links over time, memory and communication of strategies."""

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.patches import Patch, Rectangle

from megatron.longseq.figures import (
    BLUE,
    EMPTY,
    GREEN,
    LEGEND,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    TITLE,
    check_output,
    figure_file,
)
from megatron.longseq.sharding.plan.collectives import CollectiveKind, CollectivesMode, Scope, full_collective
from megatron.longseq.sharding.plan.comm_volume import CommVolume, comm_volume
from megatron.longseq.sharding.plan.memory import Memory, memory
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import RUNNING, Strategy
from megatron.longseq.sharding.plan.time_model import (
    CollectiveTime,
    LinkSpeed,
    LinkSpeeds,
    TrainingJob,
    time_collectives,
)
from megatron.longseq.sharding.tools.tables import SEVEN_B

STATES = ("parameters", "gradients", "optimizer states")
SHOWN = tuple(map(Strategy.parse, ["NNG", "NIG", "IIG", "GGG"]))
FOUR = RankGroups(4, 2)

NODES = RankGroups(32, 8)
LINKS = LinkSpeeds(LinkSpeed(200e9, 3e-6), LinkSpeed(25e9, 15e-6), channels=8)
BUCKETS = (128e6,) * 4  # bytes

_STATE_COLOURS = (BLUE, ORANGE, GREEN)
_BUCKET_COLOURS = (BLUE, SKY, PURPLE, RED)
_SENT = "#999999"
_WIDE, _TALL = 12.0, 6.6  # inches
_ROWS = {Scope.INSIDE: 0, Scope.BETWEEN: 1}
_BAR = 0.8


class Holding(NamedTuple):
    """Which of n shards every rank keeps under a strategy, for every state."""

    strategy: Strategy
    states: tuple[tuple[range, ...], ...]


class CollectiveTimeline(NamedTuple):
    """When the collectives of buckets run in a mode."""

    mode: CollectivesMode
    spans: tuple[CollectiveTime, ...]

    @property
    def end(self) -> float:
        """Seconds at which the last one is done."""
        return max((span.end for span in self.spans), default=0.0)


class Cost(NamedTuple):
    """Bytes that a rank keeps, and sends in a step, under a strategy."""

    strategy: Strategy
    held: Memory
    sent: CommVolume


class ShardingScene(NamedTuple):
    """What the figure shows.

    Attributes:
        groups: the ranks of `holdings`.
        holdings: which rank keeps what.
        kind: of the collective in `timelines`.
        timelines: a collective over all ranks, of a few buckets, in every mode.
        job: of `costs`.
        costs: of every running strategy, by bytes sent between groups, then by memory from the largest.
    """

    groups: RankGroups
    holdings: tuple[Holding, ...]
    kind: CollectiveKind
    timelines: tuple[CollectiveTimeline, ...]
    job: TrainingJob
    costs: tuple[Cost, ...]


def scene(job: TrainingJob = SEVEN_B) -> ShardingScene:
    """Return what the figure shows; `job` is that of the costs."""
    kind = CollectiveKind.REDUCE_SCATTER
    costs = sorted((_cost(strategy, job) for strategy in RUNNING), key=lambda one: (one.sent.between, -one.held.total))
    timelines = tuple(_times(kind, mode) for mode in CollectivesMode)
    return ShardingScene(FOUR, tuple(map(_holds, SHOWN)), kind, timelines, job, tuple(costs))


def _holds(strategy: Strategy) -> Holding:
    levels = (strategy.params, strategy.grads, strategy.optimizer)
    return Holding(
        strategy, tuple(tuple(FOUR.owned(level, member) for member in range(FOUR.ranks)) for level in levels)
    )


def _times(kind: CollectiveKind, mode: CollectivesMode) -> CollectiveTimeline:
    shards = [size / NODES.ranks for size in BUCKETS]
    collectives, is_overlapped = full_collective(kind, NODES, mode), mode is CollectivesMode.OVERLAPPED
    return CollectiveTimeline(mode, time_collectives(collectives, NODES, LINKS, shards, is_overlapped=is_overlapped))


def _cost(strategy: Strategy, job: TrainingJob) -> Cost:
    sent = comm_volume(strategy, job.groups, job.model, job.widths).step(job.work.microbatches)
    return Cost(strategy, memory(strategy, job.groups, job.model, job.widths), sent)


def draw(scene: ShardingScene, file: Path) -> None:
    """Draw the figure, as SVG or PNG by the file's suffix.

    Raises:
        ValueError: the suffix is another one, or the folder does not exist.
    """
    check_output(file)
    with figure_file(file, _WIDE, _TALL) as figure:
        count = len(scene.holdings)
        for index, holding in enumerate(scene.holdings):
            box = (0.065 + index * 0.935 / count, 0.735, 0.935 / count - 0.025, 0.20)
            _holding(_axes(figure, box), scene, holding, is_first=index == 0)
        latest = max(timeline.end for timeline in scene.timelines)
        for index, timeline in enumerate(scene.timelines):
            _timeline(_axes(figure, (0.065, 0.475 - index * 0.19, 0.40, 0.115)), scene, timeline, latest)
        _costs(figure, scene)
        _legends(figure, scene)


def _axes(figure: Any, box: tuple[float, float, float, float]) -> Any:
    axes = figure.add_axes(box)
    axes.tick_params(length=0, labelsize=7.5)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _holding(axes: Any, scene: ShardingScene, holding: Holding, *, is_first: bool) -> None:
    """Draw a row for every state and a column for every rank; a column is as wide as a full buffer."""
    groups = scene.groups
    starts = [rank * 1.12 + rank // groups.size * 0.18 for rank in range(groups.ranks)]
    for row, (state, ranks) in enumerate(zip(STATES, holding.states, strict=True)):
        for rank, held in enumerate(ranks):
            axes.add_patch(Rectangle((starts[rank], row), 1, _BAR, facecolor=EMPTY, linewidth=0))
            begin, width = held.start / groups.ranks, len(held) / groups.ranks
            name = f"held-{holding.strategy}-{state.split()[0]}-{rank}-{held.start}-{held.stop}"
            corner = (starts[rank] + begin, row)
            axes.add_patch(Rectangle(corner, width, _BAR, facecolor=_STATE_COLOURS[row], linewidth=0, gid=name))
    axes.set_xlim(0, starts[-1] + 1)
    axes.set_ylim(len(STATES), -0.2)
    axes.set_xticks([start + 0.5 for start in starts], [f"rank {rank}" for rank in range(groups.ranks)])
    names = [state.replace("optimizer states", "optimizer\nstates") for state in STATES]
    axes.set_yticks([row + _BAR / 2 for row in range(len(STATES))], names if is_first else [""] * len(STATES))
    axes.set_title(f"--paro {holding.strategy}", **TITLE, pad=5)
    axes.set_xlabel(f"{groups.count} groups of {groups.size} ranks", fontsize=7.5, labelpad=2)


def _timeline(axes: Any, scene: ShardingScene, timeline: CollectiveTimeline, latest: float) -> None:
    """Draw a row for every link; a flat collective occupies both, and serial ones leave one idle."""
    for row in _ROWS.values():
        axes.add_patch(Rectangle((0, row), latest * 1e3, _BAR, facecolor=EMPTY, linewidth=0))
    for run, begin, end in timeline.spans:
        name = f"time-{timeline.mode}-{run.bucket}-{run.turn}-{run.collective.scope}"
        top, height = (0, 1 + _BAR) if run.collective.scope is Scope.FLAT else (_ROWS[run.collective.scope], _BAR)
        colour = _BUCKET_COLOURS[run.bucket]
        box = Rectangle((begin * 1e3, top), (end - begin) * 1e3, height, facecolor=colour, edgecolor="white", gid=name)
        axes.add_patch(box)
    axes.set_xlim(0, latest * 1e3)
    axes.set_ylim(2, -0.05)
    axes.set_yticks([row + _BAR / 2 for row in _ROWS.values()], ["inside", "between"])
    is_last = timeline.mode is scene.timelines[-1].mode
    axes.set_xticks(range(int(latest * 1e3) + 1), None if is_last else [""] * (int(latest * 1e3) + 1))
    axes.set_xlabel("milliseconds" if is_last else "", fontsize=7.5, labelpad=1)
    axes.set_title(f"{timeline.mode}: {timeline.end * 1e3:.2f} ms", **TITLE, pad=3)


def _costs(figure: Any, scene: ShardingScene) -> None:
    """Draw a row for every strategy."""
    rows = [_BAR / 2 + row for row in range(len(scene.costs))]
    held = _bars(figure, (0.555, 0.22), "GB on a rank", [cost.held.total for cost in scene.costs])
    held.set_yticks(rows, [str(cost.strategy) for cost in scene.costs])
    for row, cost in enumerate(scene.costs):
        start = 0.0
        for state, size, colour in zip(STATES, cost.held, _STATE_COLOURS, strict=False):
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
    """Return axes for one bar in every row, labelled with its size."""
    axes, widest = _axes(figure, (place[0], 0.095, place[1], 0.495)), max(sizes) / 1e9
    for row, size in enumerate(sizes):
        axes.text(size / 1e9 + widest * 0.02, row + _BAR / 2, f"{size / 1e9:.3g}", va="center", fontsize=7.5)
    axes.set_xlim(0, widest * 1.25)
    axes.set_ylim(len(sizes), -0.2)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, **TITLE, pad=5)
    return axes


def _legends(figure: Any, scene: ShardingScene) -> None:
    words: dict[str, Any] = {**LEGEND, "borderaxespad": 0, "borderpad": 0, "handlelength": 1.2}
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
    buckets = [Patch(facecolor=colour, label=f"bucket {index}") for index, colour in enumerate(_BUCKET_COLOURS)]
    figure.legend(
        handles=[*buckets, Patch(facecolor=EMPTY, label="idle")],
        loc="lower left",
        ncols=5,
        bbox_to_anchor=(0.065, 0.012),
        **words,
    )
    states = [Patch(facecolor=colour, label=state) for colour, state in zip(_STATE_COLOURS, STATES, strict=True)]
    figure.legend(
        handles=[*states, Patch(facecolor=_SENT, label="sent")],
        loc="lower left",
        ncols=4,
        bbox_to_anchor=(0.555, 0.012),
        **words,
    )
