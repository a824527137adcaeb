"""Draw training and held-out loss of a run from its TensorBoard files."""

from dataclasses import dataclass
from pathlib import Path

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curves:
    """Training and held-out loss as (step, loss) in ascending order of steps."""

    train: Points
    held_out: Points


def read(folder: Path) -> Curves:
    """Read the losses that upstream's writer stored in `folder`.

    If runs overlap, as after a resume, the later one counts. At the end of a run, upstream evaluates once more on other
    batches and stores the result under the same name and step as the evaluation during training. Within a run the first
    value counts, which the log calls "validation loss at iteration N".

    Raises:
        ValueError: the files hold no training loss.
    """
    from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-untyped]
        EventFileLoader,
    )

    found: dict[str, dict[int, float]] = {"lm loss": {}, "lm loss validation": {}}
    for file in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime):
        written: dict[str, dict[int, float]] = {tag: {} for tag in found}
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag in written:
                    written[value.tag].setdefault(event.step, value.tensor.float_val[0])
        for tag, points in written.items():
            found[tag].update(points)
    if not found["lm loss"]:
        raise ValueError(
            f"no 'lm loss' in the TensorBoard files of {folder}: was the run started with --tensorboard-dir?"
        )
    return Curves(sorted(found["lm loss"].items()), sorted(found["lm loss validation"].items()))


def draw(curves: Curves, png: Path, resumed_at: int | None = None) -> None:
    """Draw the curves to `png`, and as SVG under the same name.

    Args:
        curves: the losses.
        png: path of the picture.
        resumed_at: step of the checkpoint that the run resumed from, to mark in the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    axes.plot(*zip(*curves.train, strict=True), color="#0072b2", linewidth=1.4, label="training loss")
    if curves.held_out:
        axes.plot(*zip(*curves.held_out, strict=True), "o-", color="#d55e00", markersize=5, label="held-out loss")
        step, loss = curves.held_out[-1]
        axes.annotate(f"{loss:.4f}", (step, loss), textcoords="offset points", xytext=(-8, 12), color="#d55e00")
    if resumed_at is not None:
        axes.axvline(resumed_at, color="0.6", linestyle="--", linewidth=1)
        top = max(loss for _, loss in curves.train)
        axes.annotate(
            "resumed from the checkpoint", (resumed_at, top), textcoords="offset points", xytext=(6, -6), color="0.4"
        )
    axes.set(
        xlabel="step", ylabel="loss (nats per byte)", title="A GPT on the standard library's sources, byte by byte"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(png, dpi=150)
    figure.savefig(png.with_suffix(".svg"))
    pyplot.close(figure)
