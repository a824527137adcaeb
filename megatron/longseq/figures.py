"""Write figures in one style, to files that are complete or not there at all. Importing this imports no matplotlib."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIXES = (".svg", ".png")
# Okabe and Ito's palette, which every kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, SKY, PURPLE, RED = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#D55E00"
EMPTY = "#EFEFEF"
TITLE: dict[str, Any] = {"loc": "left", "fontweight": "bold", "fontsize": 9.5}
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8}


def check_output(file: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Check that a file can be written.

    Args:
        file: path that --output gives.
        suffixes: suffixes that are allowed, with the dot.

    Raises:
        ValueError: its suffix is not one of `suffixes`, or its folder does not exist.
    """
    if file.suffix not in suffixes:
        listed = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise ValueError(f"--output {file}: the suffix must be {listed}, but it is {file.suffix or 'missing'}")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"--output {file}: there is no folder {file.absolute().parent}; create it first")


@contextmanager
def complete_file(file: Path) -> Iterator[Path]:
    """Yield a path to write to: without an error it takes the place of `file`, otherwise it is removed."""
    half = file.with_name(f".{file.stem}.half{file.suffix}")
    try:
        yield half
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)


@contextmanager
def figure_file(file: Path, width: float, height: float, **style: Any) -> Iterator[Any]:
    """Yield a matplotlib figure to draw on, and save it as SVG or PNG by the file's suffix.

    Args:
        file: see `check_output`.
        width, height: inches.
        **style: further settings of matplotlib, with `_` for `.`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {name.replace("_", "."): value for name, value in style.items()}
    with rc_context({"font.size": 8.5, "svg.hashsalt": "longseq", "svg.fonttype": "none", **settings}):
        figure = Figure(figsize=(width, height))
        yield figure
        with complete_file(file) as half:
            figure.savefig(half, dpi=140, metadata={"Date": None} if file.suffix == ".svg" else None)


def axes_at(figure: Any, box: tuple[float, float, float, float]) -> Any:
    """Add axes at a box of a figure: left, bottom, width and height in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
