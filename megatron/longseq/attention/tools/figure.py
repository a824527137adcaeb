"""Picture of the method: chunks on ranks before and after the all-to-all, and the blocks of every ring step."""

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Polygon, Rectangle

from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ranges import TokenRange, TokenRanges, size
from megatron.longseq.attention.plan.ring_schedule import Ring, RingStep, plan_ring_attention
from megatron.longseq.attention.plan.tiles import Mask
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
    axes_at,
    check_output,
    figure_file,
)

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, "#F0E442", "#999999")
_LINE = "#FFFFFF"
_WIDE, _ROW, _MARGIN, _GAP = 12.0, 0.24, 0.55, 0.30  # inches
_HEAD, _FOOT, _LEGEND = 0.42, 0.36, 0.34  # inches above a panel, below a step, at the bottom


class Cell(NamedTuple):
    """A square of scores that a ring index computes: chunk `query` of the queries by chunk `key` of the keys."""

    ring: int
    query: int
    key: int


class Sending(NamedTuple):
    """Keys in flight during a step: sender and receiver are ring indices, `part` is the share of the source's keys."""

    sender: int
    receiver: int
    part: float


class AttentionScene(NamedTuple):
    """What the picture shows of a sequence of 2C chunks.

    Attributes:
        mesh: the ranks.
        before: chunks that every rank holds, in order, with all heads.
        after: chunks after the all-to-all, with a share of the heads.
        steps: cells computed and keys in flight in every step of the ring.
    """

    mesh: Mesh
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[tuple[Cell, ...], tuple[Sending, ...]], ...]


def scene(mesh: Mesh) -> AttentionScene:
    """Return the scene of plain causal attention; a chunk is one token."""
    layout = Layout(mesh, (2 * mesh.size,))
    shards = layout.shards(range(1))
    ring = Ring(mesh.ring, mesh.ring)
    plans = [plan_ring_attention(ring, shards, shards, Mask(1), rank, rectangular=True) for rank in range(mesh.ring)]
    steps = [
        (
            tuple(cell for rank, plan in enumerate(plans) for cell in _cells(rank, plan[index], shards)),
            tuple(
                Sending(move.sender, move.receiver, size(move.rows) / size(shards[move.source]))
                for plan in plans
                for move in plan[index].kv_sends
            ),
        )
        for index in range(mesh.ring)
    ]
    return AttentionScene(
        mesh,
        tuple(_numbers(layout.positions(rank, 0)) for rank in range(mesh.size)),
        tuple(_numbers(layout.ring_positions(mesh.place(rank).ring, 0)) for rank in range(mesh.size)),
        tuple(steps),
    )


def _cells(rank: int, step: RingStep, shards: tuple[TokenRanges, ...]) -> list[Cell]:
    queries = _numbers(shards[rank])
    source = _numbers(shards[step.source])
    keys = [source[row] for row in _numbers(step.kv_rows)]
    cells = []
    for tile in (*step.first, *step.more):
        for block in tile.blocks:
            for row in range(*tile.rows):
                last = block.keys.end - (tile.rows.end - 1 - row) * block.causal
                cells += [Cell(rank, queries[row], keys[key]) for key in range(block.keys.begin, last)]
    return cells


def _numbers(spans: tuple[TokenRange, ...]) -> tuple[int, ...]:
    return tuple(number for span in spans for number in range(*span))


def draw(scene: AttentionScene, file: Path) -> None:
    """Write the picture as SVG or PNG, by the file's suffix.

    Raises:
        ValueError: The suffix is another one, or there are more ring indices than colours.
    """
    check_output(file)
    ranks, ring = scene.mesh.size, scene.mesh.ring
    if ring > len(COLOURS):
        raise ValueError(f"a ring of {ring} ranks: a figure can show {len(COLOURS)}")
    side = min((_WIDE - _MARGIN - _GAP * ring) / ring, 2.6)
    above = _HEAD + _ROW * ranks
    tall = above + _HEAD + side + _FOOT + _LEGEND
    with figure_file(file, _WIDE, tall) as figure:
        half = (_WIDE - 2 * _MARGIN - _GAP) / 2
        for index, positions in enumerate((scene.before, scene.after)):
            box = (_MARGIN + index * (half + _MARGIN), tall - above, half, _ROW * ranks)
            _holdings(_axes(figure, box), scene, positions, shared=index > 0)
        for index, (cells, sendings) in enumerate(scene.steps):
            box = (_MARGIN + index * (side + _GAP), _LEGEND + _FOOT, side, side)
            _step(_axes(figure, box), scene, index, cells, sendings)
        _legend(figure, ring)


def _axes(figure: Any, box: tuple[float, float, float, float]) -> Any:
    axes = axes_at(figure, box)
    axes.set_facecolor(EMPTY)
    axes.tick_params(length=0, labelsize=7.5)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _holdings(axes: Any, scene: AttentionScene, positions: tuple[tuple[int, ...], ...], *, shared: bool) -> None:
    """Draw ranks as rows and chunks as columns; the height of a bar is the share of the heads."""
    mesh, chunks = scene.mesh, 2 * scene.mesh.size
    axes.set_xlim(0, chunks)
    axes.set_ylim(mesh.size, 0)
    for rank, numbers in enumerate(positions):
        place = mesh.place(rank)
        height = 1 / mesh.ulysses if shared else 1.0
        top = rank + (place.ulysses * height if shared else 0)
        for chunk in numbers:
            name = f"{'after' if shared else 'before'}-{rank}-{chunk}"
            colour = _colour(place.ring, 0 if shared else place.ulysses, mesh.ulysses)
            axes.add_patch(Rectangle((chunk, top), 1, height, facecolor=colour, linewidth=0, gid=name))
            if not shared:
                axes.text(chunk + 0.5, rank + 0.5, str(chunk), ha="center", va="center", fontsize=6.5, color="white")
    axes.set_xticks([])
    axes.set_yticks([rank + 0.5 for rank in range(mesh.size)], [f"rank {rank}" for rank in range(mesh.size)])
    for line in range(1, chunks):
        axes.axvline(line, color=_LINE, linewidth=0.6)
    for line in range(1, mesh.size):
        axes.axhline(line, color=_LINE, linewidth=2.2 if line % mesh.ulysses == 0 else 0.8)
    text = f"data on {mesh.ulysses} x {mesh.ring} ranks (Ulysses x ring): two of {chunks} chunks each, all heads"
    if shared:
        text = f"after the all-to-all: a Ulysses group's chunks, 1/{mesh.ulysses} of the heads"
    axes.set_title(text, **TITLE, pad=4)


def _step(axes: Any, scene: AttentionScene, index: int, cells: tuple[Cell, ...], sendings: tuple[Sending, ...]) -> None:
    """Draw queries as rows and keys as columns; what no step computes is masked."""
    chunks = 2 * scene.mesh.size
    axes.set_xlim(0, chunks)
    axes.set_ylim(chunks, 0)
    for cell in cells:
        corners = [(cell.key, cell.query), (cell.key, cell.query + 1), (cell.key + 1, cell.query + 1)]
        if cell.key != cell.query:
            corners.append((cell.key + 1, cell.query))
        colour, name = COLOURS[cell.ring], f"step-{index}-{cell.ring}-{cell.query}-{cell.key}"
        axes.add_patch(Polygon(corners, facecolor=colour, edgecolor=colour, linewidth=0.3, gid=name))
    for line in range(scene.mesh.ulysses, chunks, scene.mesh.ulysses):
        axes.axvline(line, color=_LINE, linewidth=0.6)
        axes.axhline(line, color=_LINE, linewidth=0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"ring, step {index}", **TITLE, pad=4)
    parts = [f"{one.sender}→{one.receiver} {_part(one.part)}" for one in sendings]
    words = f"keys sent: {', '.join(parts)}" if parts else "nothing is sent"
    axes.set_xlabel(words, fontsize=7.2, loc="left", labelpad=3)
    if index == 0:
        axes.set_ylabel("queries", fontsize=8)


def _part(part: float) -> str:
    return {1.0: "all", 0.5: "half"}.get(part, f"{part:.2f}")


def _colour(ring: int, ulysses: int, count: int) -> tuple[float, ...]:
    """Return a ring index's colour, closer to white for later ranks of a Ulysses group."""
    share = 0.45 * ulysses / count
    return tuple(part + (1 - part) * share for part in to_rgb(COLOURS[ring]))


def _legend(figure: Any, ring: int) -> None:
    handles = [Patch(facecolor=COLOURS[index], label=f"ring index {index}") for index in range(ring)]
    handles.append(Patch(facecolor=EMPTY, label="not held; not computed in this step"))
    handles.append(Patch(alpha=0, label="steps: queries down, keys across, both in order of position"))
    place = (_MARGIN / figure.get_size_inches()[0], 0.0)
    style: Any = {**LEGEND, "borderaxespad": 0.2, "borderpad": 0.3, "handlelength": 1.4}
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=place, ncols=len(handles), **style)
