"""Draw plans of a step: one panel each on a common time axis, ranks by time, coloured by sequence."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import EngFormatter

from megatron.longseq.figures import EMPTY, LEGEND, TITLE, axes_at, check_output, figure_file
from megatron.longseq.flexsp.plan.plan import SequenceGroup, StepPlan

_WIDTH, _LEFT = 10.0, 0.62  # inches: of the figure, and left of the panels
_ROW, _LEAST, _MOST = 0.2, 1.2, 2.6  # inches: of a rank, smallest and largest height of a panel's ranks
_PANEL, _ENDS = 0.42, 0.5  # inches: of the rest of a panel, of time axis and legend
_SHADES = 5  # lengths in the legend


def draw(plans: Mapping[str, StepPlan], lengths: Sequence[int], file: Path) -> None:
    """Draw plans of the same step above each other, as SVG or PNG by the file's suffix.

    A bar is a sequence on the ranks of its group. A group's time is divided among its sequences by the work of each,
    taken as its tokens plus its squared tokens over the mean length.

    Args:
        plans: by the title of their panel.
        lengths: tokens of the step's sequences.
        file: where to write.

    Raises:
        ValueError: the suffix is another one, or there is nothing to draw.
    """
    check_output(file)
    if not plans or not lengths:
        raise ValueError(f"{file}: there is no sequence to draw")
    ranks = max(sum(group.degree for group in one.groups) for plan in plans.values() for one in plan.microbatches)
    rows = min(max(_ROW * ranks, _LEAST), _MOST)
    end = max(plan.seconds for plan in plans.values())
    height = len(plans) * (rows + _PANEL) + _ENDS
    with figure_file(file, _WIDTH, height, axes_linewidth=0.6) as figure:
        top = height
        for title, plan in plans.items():
            axes = axes_at(figure, (_LEFT, top - 0.3 - rows, _WIDTH - _LEFT - 0.15, rows))
            top -= rows + _PANEL
            _panel(axes, title, plan, lengths)
            axes.set_xlim(0, end)
            axes.set_ylim(ranks, 0)
            axes.tick_params(labelbottom=top < _ENDS + 1e-6)
        _legend(figure, lengths)


def _panel(axes: Any, title: str, plan: StepPlan, lengths: Sequence[int]) -> None:
    axes.set_facecolor(EMPTY)
    begin = 0.0
    for number, one in enumerate(plan.microbatches):
        for group in one.groups:
            _bars(axes, begin, group, lengths, f"{title}-{number}")
        begin += one.seconds
        axes.axvline(begin, color="#222222", linewidth=0.7)
    axes.set_ylabel("rank", fontsize=8)
    axes.tick_params(length=2, width=0.6, labelsize=7.5)
    axes.xaxis.set_major_formatter(EngFormatter(unit="s"))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, **TITLE, pad=4)
    axes.set_title(f"idle {plan.idle_share:.1%}   step {plan.seconds:.2f} s", loc="right", fontsize=9.5, pad=4)


def _bars(axes: Any, begin: float, group: SequenceGroup, lengths: Sequence[int], name: str) -> None:
    mean = sum(lengths) / len(lengths)
    work = [lengths[index] * (1 + lengths[index] / mean) for index in group.sequences]
    for index, share in sorted(zip(group.sequences, work, strict=True), key=lambda one: -one[1]):
        width = group.seconds * share / sum(work)
        axes.add_patch(
            Rectangle(
                (begin, group.ranks[0]),
                width,
                group.degree,
                facecolor=_colour(lengths[index], lengths),
                edgecolor="white",
                linewidth=0.25,
                gid=f"{name}-{index}",
            )
        )
        begin += width


def _colour(length: int, lengths: Sequence[int]) -> Any:
    low, high = math.log(min(lengths)), math.log(max(lengths))
    return colormaps["viridis_r"]((math.log(length) - low) / (high - low) if high > low else 0.5)


def _legend(figure: Any, lengths: Sequence[int]) -> None:
    low, high = math.log(min(lengths)), math.log(max(lengths))
    shown = sorted({round(math.exp(low + (high - low) * step / (_SHADES - 1))) for step in range(_SHADES)})
    handles = [Patch(facecolor=_colour(length, lengths), label=f"{length:,} tokens") for length in shown]
    handles.append(Patch(facecolor=EMPTY, edgecolor="#BBBBBB", linewidth=0.6, label="idle"))
    place = (_LEFT / figure.get_size_inches()[0], 0.0)
    style: Any = {**LEGEND, "borderaxespad": 0.2, "borderpad": 0.3, "handlelength": 1.6}
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=place, ncols=len(handles), **style)
