"""Draw timelines: one panel each on a common time axis, with a row per rank and a bar per action."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import EngFormatter

from megatron.longseq.figures import BLUE, EMPTY, GREEN, LEGEND, ORANGE, TITLE, axes_at, check_output, figure_file
from megatron.longseq.pipeline.plan.schedule import Action, ActionKind
from megatron.longseq.pipeline.plan.simulate import ActionTime, Timeline

COLOURS = {ActionKind.FORWARD: BLUE, ActionKind.BACKWARD: ORANGE, ActionKind.WEIGHT: GREEN}
_WORDS = {ActionKind.FORWARD: "forward", ActionKind.BACKWARD: "backward", ActionKind.WEIGHT: "weight gradient"}
_LIGHTEN = (0.0, 0.22, 0.42, 0.58)  # share of white in the colour, by micro-batch in turn
_NARROW, _WIDE, _ACTION = 12.0, 24.0, 0.09  # inches: smallest and largest width of the figure, width per action
_ROW, _PANEL, _ENDS = (
    0.27,
    0.40,
    0.62,
)  # inches: height of a rank's row, of the rest of a panel, of time axis and legend
_MARGIN = 0.62  # inches left of the rows
_FONT = 6.5  # points: size of the labels in the bars


def draw(timelines: Sequence[Timeline], file: Path) -> None:
    """Draw timelines above each other on one time axis, as SVG or PNG by the file's suffix.

    Raises:
        ValueError: the suffix is another one, or there is nothing to draw.
    """
    check_output(file)
    if not any(timeline.spans and any(timeline.spans) for timeline in timelines):
        raise ValueError(f"{file}: there is no action to draw")
    heights = [_PANEL + _ROW * timeline.pipeline.stages for timeline in timelines]
    most = max(len(spans) for timeline in timelines for spans in timeline.spans)
    wide = min(max(_NARROW, _ACTION * most), _WIDE)
    with figure_file(file, wide, sum(heights) + _ENDS, axes_linewidth=0.6) as figure:
        end = max(timeline.makespan for timeline in timelines)
        top = sum(heights) + _ENDS
        for timeline, height in zip(timelines, heights, strict=True):
            rows = _ROW * timeline.pipeline.stages
            box = (_MARGIN, top - 0.30 - rows, wide - _MARGIN - 0.12, rows)
            top -= height
            axes = axes_at(figure, box)
            _panel(axes, timeline, end, box[2])
            axes.tick_params(labelbottom=timeline is timelines[-1])
        _legend(figure, timelines)


def _panel(axes: Any, timeline: Timeline, end: float, inches: float) -> None:
    begin = min(span.start for spans in timeline.spans for span in spans)
    axes.set_xlim(0, end)
    axes.set_ylim(timeline.pipeline.stages - 0.5, -0.5)
    axes.set_facecolor(EMPTY)
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            _bar(axes, timeline, rank, ActionTime(span.action, span.start - begin, span.end - begin), inches / end)
    axes.set_yticks(range(timeline.pipeline.stages), [f"rank {rank}" for rank in range(timeline.pipeline.stages)])
    axes.tick_params(length=2, width=0.6, labelsize=7.5)
    axes.xaxis.set_major_formatter(EngFormatter(unit="s"))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    makespan = EngFormatter(unit="s", places=2)(timeline.makespan)
    axes.set_title(timeline.name, **TITLE, pad=4)
    axes.set_title(f"bubble {timeline.bubble:.1%}   step {makespan}", loc="right", fontsize=9.5, pad=4)


def _bar(axes: Any, timeline: Timeline, rank: int, span: ActionTime, inches: float) -> None:
    """Draw an action as a bar with its label, if it fits, and a dark foot that grows with the virtual stage."""
    action, width = span.action, span.end - span.start
    colour, height = _colour(action), 0.84
    name = f"bar-{rank}-{action.kind}-{action.microbatch}-{action.segment}-{action.vstage}"
    line = min(0.4, 0.05 * width * inches * 72)  # points; thin bars must not vanish under their edges
    corner = (span.start, rank - height / 2)
    axes.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor="white", linewidth=line, gid=name))
    foot = 0.36 * height * action.vstage / timeline.pipeline.virtual
    if action.vstage:
        corner = (span.start, rank + height / 2 - foot)
        axes.add_patch(Rectangle(corner, width, foot, facecolor="#222222", linewidth=0))
    label = str(action.microbatch) if timeline.pipeline.segments == 1 else f"{action.microbatch}.{action.segment}"
    across = len(label) * 0.62 * _FONT / 72 < width * inches
    if across or (width * inches > _FONT / 72 and len(label) * 0.62 * _FONT / 72 < height * _ROW):
        dark = sum(part * weight for part, weight in zip(colour, (0.3, 0.59, 0.11), strict=True)) < 0.5
        style: Any = {"fontsize": _FONT, "color": "white" if dark else "#222222", "rotation": 0 if across else 90}
        vertical = "center_baseline" if across else "center"
        axes.text((span.start + span.end) / 2, rank - foot / 2, label, ha="center", va=vertical, **style)


def _colour(action: Action) -> tuple[float, float, float]:
    lighten = _LIGHTEN[action.microbatch % len(_LIGHTEN)]
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(COLOURS[action.kind]))
    return colorsys.hls_to_rgb(hue, light + (1 - light) * lighten, saturation)


def _legend(figure: Any, timelines: Sequence[Timeline]) -> None:
    actions = [span.action for timeline in timelines for spans in timeline.spans for span in spans]
    kinds = {action.kind for action in actions}
    handles = [Patch(facecolor=COLOURS[kind], label=_WORDS[kind]) for kind in ActionKind if kind in kinds]
    handles.append(Patch(facecolor=EMPTY, edgecolor="#BBBBBB", linewidth=0.6, label="idle"))
    if any(action.vstage for action in actions):
        handles.append(Patch(facecolor="#222222", label="foot: virtual stage, the higher the later"))
    segments = any(action.segment for action in actions)
    label = "label: micro-batch.segment" if segments else "label: micro-batch"
    handles.append(Patch(alpha=0, label=f"{label}; shade: micro-batch"))
    place = (_MARGIN / figure.get_size_inches()[0], 0.0)
    style: Any = {**LEGEND, "borderaxespad": 0.2, "borderpad": 0.3, "handlelength": 1.6}
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=place, ncols=len(handles), **style)
