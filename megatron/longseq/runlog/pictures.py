"""Draw the pictures of a report: curves over the steps, memory of the ranks, the pipeline's timeline."""

import base64
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.longseq.figures import BLUE, GREEN, LEGEND, ORANGE, PURPLE, RED, SKY, TITLE, axes_at, figure_file
from megatron.longseq.runlog import record
from megatron.longseq.runlog.chart import thin
from megatron.longseq.runlog.folder import Record
from megatron.longseq.runlog.screen import number

POINTS = 1500  # of a curve; longer ones are drawn as means of equal pieces
FEWEST_BARS = 8  # room is left for so many
BARS = 128  # ranks drawn as bars; more are drawn as a curve in the order of their memory
_WIDE, _HIGH, _LEFT, _GAP = 11.0, 1.75, 0.85, 0.62  # inches

Series = Sequence[tuple[float, float]]


def inline(draw: Callable[[Path], None]) -> str:
    """Return a picture as the address of an image, which holds the picture itself.

    Args:
        draw: writes the picture to a file (.svg).
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.svg")
        draw(file)
        return "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode()


def losses(steps: Sequence[Record]) -> dict[str, Series]:
    """Return the curve of each loss by its name."""
    names = dict.fromkeys(name for step in steps for name in step.get("losses", {}))
    found: dict[str, Series] = {}
    for name in names:
        values = [(step["iteration"], step.get("losses", {}).get(name)) for step in steps]
        found[name] = [(at, math.nan if value is None else value) for at, value in values]
    return found


def of_field(steps: Sequence[Record], name: str, unit: float = 1.0) -> Series:
    """Return the curve of a field, in multiples of `unit`.

    Args:
        steps: records of the steps.
        name: name of the field.
        unit: what the values are divided by.

    Returns:
        (iteration, value); NaN where the value is not known.
    """
    return [(step["iteration"], number(step, name) / unit) for step in steps]


def training_curves(
    steps: Sequence[Record], held_out: Mapping[str, Series], restarts: Sequence[int]
) -> Callable[[Path], None]:
    """Return what draws loss, gradient norm and learning rate.

    Args:
        steps: records of the steps.
        held_out: losses of evaluations by the name of their set.
        restarts: the steps at which a further start began.
    """
    loss = [(name, series, colour) for (name, series), colour in zip(losses(steps).items(), _COLOURS, strict=False)]
    apart = [(f"{name}, held out", series, _HELD_OUT[at % 3]) for at, (name, series) in enumerate(held_out.items())]
    norm, rate = of_field(steps, "grad_norm"), of_field(steps, "learning_rate")
    panels = [
        ("loss", [*loss, *apart]),
        ("norm of the gradient", [("", norm, GREEN)]),
        ("learning rate", [("", rate, PURPLE)]),
    ]
    return lambda file: _draw(file, panels, restarts)


def speed_curves(steps: Sequence[Record], restarts: Sequence[int]) -> Callable[[Path], None]:
    """Return a function that draws throughput, MFU, bubble and memory over the steps to a file.

    Args:
        steps: records of the steps.
        restarts: the steps at which a further start began.
    """
    panels = [
        ("tokens/s/GPU", [("", of_field(steps, "tokens_per_second_per_gpu"), BLUE)]),
        ("model TFLOP/s/GPU", [("", of_field(steps, "tflops_per_gpu"), GREEN)]),
        (
            "MFU (%)",
            [
                ("causal attention counted once", of_field(steps, "mfu", 0.01), PURPLE),
                ("counted twice", of_field(steps, "mfu_full", 0.01), ORANGE),
            ],
        ),
        ("bubble (%), measured", [("", of_field(steps, "bubble", 0.01), RED)]),
    ]
    known = [panel for panel in panels if any(math.isfinite(value) for _, series, _ in panel[1] for _, value in series)]
    return lambda file: _draw(file, known, restarts)


_COLOURS = (BLUE, SKY, GREEN, PURPLE)
_HELD_OUT = (RED, ORANGE, "#555555")


def _draw(file: Path, panels: Sequence[tuple[str, list[tuple[str, Series, str]]]], restarts: Sequence[int]) -> None:
    height = len(panels) * (_HIGH + _GAP) + 0.15
    with figure_file(file, _WIDE, height, axes_linewidth=0.6) as figure:
        for index, (title, curves) in enumerate(panels):
            bottom = height - (index + 1) * (_HIGH + _GAP) + 0.3
            axes = axes_at(figure, (_LEFT, bottom, _WIDE - _LEFT - 0.15, _HIGH))
            for name, series, colour in curves:
                few = len(series) < 40
                style: Any = {"marker": "o" if few else "", "markersize": 3, "linewidth": 1.2}
                points = thin(series, POINTS)
                axes.plot([at for at, _ in points], [value for _, value in points], color=colour, label=name, **style)
            for at in restarts:
                axes.axvline(at, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
            _frame(axes, title, has_legend=any(name for name, _, _ in curves))
            axes.xaxis.get_major_locator().set_params(integer=True)
            if index == len(panels) - 1:
                axes.set_xlabel("step", fontsize=8)


def _frame(axes: Any, title: str, has_legend: bool) -> None:
    axes.set_title(title, **TITLE, pad=4)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=2, width=0.6, labelsize=7.5)
    axes.ticklabel_format(axis="y", scilimits=(-3, 6), useMathText=True)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if has_legend:
        axes.legend(**LEGEND, loc="best")


def memory_of_ranks(memory: Record) -> Callable[[Path], None]:
    """Return what draws the peak memory of each rank."""
    peaks = [peak / record.GIB for peak in memory["peak_bytes"]]

    def draw(file: Path) -> None:
        with figure_file(file, _WIDE, 2.6, axes_linewidth=0.6) as figure:
            axes = axes_at(figure, (_LEFT, 0.55, _WIDE - _LEFT - 0.15, 1.7))
            if len(peaks) <= BARS:
                axes.bar(range(len(peaks)), peaks, color=BLUE, width=0.8)
                axes.set_xlim(-0.6, max(len(peaks), FEWEST_BARS) - 0.4)
                axes.set_xlabel("rank", fontsize=8)
                axes.set_xticks(range(0, len(peaks), max(1, len(peaks) // 16)))
            else:
                axes.plot(sorted(peaks, reverse=True), color=BLUE, linewidth=1.2)
                axes.set_xlabel("ranks in the order of their memory", fontsize=8)
            axes.set_ylim(0, 1.08 * max(peaks))
            _frame(axes, "peak of allocated memory (GiB)", has_legend=False)

    return draw
