"""The picture of a case: the arms' loss curves above, their difference with what is tolerated below."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy
from matplotlib import pyplot

from tests.regression.compare import LOSS_TOLERANCE
from tests.regression.noise import EPSILON, FACTOR, Floor
from tests.regression.suite import Outcome

# Okabe and Ito's colours: told apart by every kind of colour vision, and in grey by their markers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def draw(outcome: Outcome, folder: Path) -> None:
    """Write curve.svg and curve.png of a case's first seed."""
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
    case, trial = outcome.case, outcome.trials[0]
    u, o = _losses(trial.u.curve), _losses(trial.o.curve)
    steps = numpy.arange(1, min(len(u), len(o)) + 1)
    u, o = u[: len(steps)], o[: len(steps)]
    axes.axhline(0, color=GREY, linewidth=0.8)
    band = numpy.zeros(len(steps))
    if trial.floor:
        floor = Floor(
            u.tolist(), [_losses(run.curve)[: len(steps)].tolist() for run in trial.floor], EPSILON[case.arithmetic]
        )
        band = FACTOR * floor.band()
        for index, difference in enumerate(floor.differences()):
            axes.plot(
                steps,
                difference,
                color=BLUE,
                alpha=0.6,
                linewidth=1,
                label="U' - U (noise floor)" if not index else None,
            )
    elif case.klass == "E1":
        band = LOSS_TOLERANCE * numpy.abs(u)
    if band.any():
        axes.fill_between(steps, -band, band, color=GREY, alpha=0.25, linewidth=0, label="tolerated")
    axes.plot(steps, o - u, color=ORANGE, marker="o", markersize=3, linewidth=1.2, label="O - U")
    if not band.any() and not (o - u).any():
        axes.text(0.5, 0.8, "bit for bit equal in every step", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_ylim(-1, 1)
        axes.set_yticks([0])
    elif band.any() and numpy.abs(o - u).max() < 0.02 * band.max():
        worst = numpy.abs(o - u).max()
        axes.text(0.99, 0.06, f"largest |O - U|: {worst:.1e}", transform=axes.transAxes, ha="right", color=ORANGE)
    axes.set_ylabel("difference")
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)


def _losses(curve: Any) -> Any:
    return numpy.array([step["loss"] for step in curve], float)


def _layout(world: int, flags: tuple[str, ...]) -> str:
    words = " ".join(flags)
    words = words if len(words) <= 60 else words[:57] + "..."
    return f", {world} rank{'s' if world > 1 else ''} {words}".rstrip()
