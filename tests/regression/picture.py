"""Draw a case: loss curves of the arms above, and their difference with the tolerance below."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker

mpl.use("Agg")

import numpy
from matplotlib import pyplot

from tests.regression.compare import LOSS_TOLERANCE
from tests.regression.noise import FACTOR, Floor
from tests.regression.suite import Outcome

# Okabe and Ito's colours, which people with any colour vision can distinguish.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def draw(outcome: Outcome, folder: Path) -> None:
    """Write curve.svg and curve.png for the first seed of a case."""
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"}):
        figure, (above, below) = pyplot.subplots(
            2, 1, figsize=(7.2, 5.2), sharex=True, height_ratios=(2, 1), layout="constrained"
        )
        _curves(above, outcome)
        _differences(below, outcome)
        case, word = outcome.case, "passed" if outcome.passed else "FAILED"
        figure.suptitle(f"{case.name}: class {case.klass}, {case.arithmetic}, {word}", fontweight="bold")
        for suffix in ("svg", "png"):
            metadata = {"Date": None} if suffix == "svg" else None
            figure.savefig(folder / f"curve.{suffix}", dpi=130, metadata=metadata)
        pyplot.close(figure)


def _curves(axes: Any, outcome: Outcome) -> None:
    case, trial = outcome.case, outcome.trials[0]
    u, o = _losses(trial.u.curve), _losses(trial.o.curve)
    label = f"U: upstream{_layout(case.u.world, case.u.flags)}"
    axes.plot(range(1, len(u) + 1), u, color=BLUE, linewidth=4, alpha=0.45, label=label)
    label = f"O: ours{_layout(case.o.world, case.o.flags)}"
    axes.plot(range(1, len(o) + 1), o, color=ORANGE, linewidth=1.2, marker="o", markersize=3, label=label)
    if outcome.oracle:
        x = _losses(outcome.oracle)
        axes.plot(
            range(1, len(x) + 1),
            x,
            color=GREEN,
            linestyle="none",
            marker="x",
            markersize=6,
            label="X: independent oracle",
        )
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _differences(axes: Any, outcome: Outcome) -> None:
    trial = outcome.trials[0]
    u, o = _losses(trial.u.curve), _losses(trial.o.curve)
    steps = numpy.arange(1, min(len(u), len(o)) + 1)
    difference, band = numpy.abs(o[: len(steps)] - u[: len(steps)]), _tolerated(outcome)[: len(steps)]
    noise = [numpy.abs(_losses(run.curve)[: len(steps)] - u[: len(steps)]) for run in trial.floor]
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    if not band.any():
        axes.plot(steps, difference, color=ORANGE, marker="o", markersize=3, linewidth=1.2)
        axes.set_ylabel("|O - U|")
        if not difference.any():
            axes.set_yticks([0])
            axes.set_ylim(-1, 1)
            axes.text(0.5, 0.75, "the same bits in every step", transform=axes.transAxes, ha="center")
        return
    lowest = max(1e-17, 0.1 * min([x for x in (*difference, *numpy.ravel(noise)) if x > 0], default=band.min() * 1e-3))
    axes.set_yscale("log")
    axes.fill_between(steps, lowest, band, color=GREY, alpha=0.25, linewidth=0, label="tolerated")
    for index, other in enumerate(noise):
        label = None if index else "|U' - U|, noise floor"
        axes.plot(steps, numpy.maximum(other, lowest), color=BLUE, alpha=0.6, linewidth=1.2, label=label)
    label = "|O - U|" if difference.all() else "|O - U| (at the bottom: none)"
    shown = numpy.maximum(difference, lowest)
    axes.plot(steps, shown, color=ORANGE, marker="o", markersize=3, linewidth=1.2, label=label)
    axes.set_ylim(lowest, 100 * max(band.max(), difference.max()))
    axes.set_ylabel("difference")
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)


def _tolerated(outcome: Outcome) -> Any:
    """Return the tolerance of the loss per step, with zeros if the losses must be equal."""
    case, trial = outcome.case, outcome.trials[0]
    u = _losses(trial.u.curve)
    if case.klass == "E0":
        return numpy.zeros(len(u))
    if case.arithmetic == "float64":
        return LOSS_TOLERANCE * numpy.abs(u)
    floors = [Floor(_losses(t.u.curve), [_losses(run.curve) for run in t.floor]) for t in outcome.trials]
    if case.klass == "E1":
        return FACTOR * floors[0].band()
    return numpy.full(len(u), FACTOR * max(numpy.abs(floor.differences()).max() for floor in floors))


def _losses(curve: Any) -> Any:
    return numpy.array([step["loss"] for step in curve], float)


def _layout(world: int, flags: tuple[str, ...]) -> str:
    lines = textwrap.wrap(" ".join(flags).replace("--", ""), 48)
    return "\n".join([f", {world} rank{'s' if world > 1 else ''}", *lines])
