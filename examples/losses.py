"""Print the losses of several runs side by side and compare them with those of the first run.

    python -m examples.losses NAME=RUN_FOLDER NAME=RUN_FOLDER ... [--tolerance 1e-5]

The exit status is 1 if the relative difference of a loss exceeds the tolerance.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from megatron.longseq.runlog.folder import RunFolder


class LoggedStep(NamedTuple):
    """One training step of a run."""

    seconds: float
    loss: float


def read(folder: Path) -> dict[int, LoggedStep]:
    """Return the training steps of a run by number.

    Raises:
        ValueError: the folder holds no run, or its record contains no step.
    """
    run = RunFolder(folder)
    run.refresh()
    if problem := run.problem():
        raise ValueError(problem)
    steps = {}
    for step in run.steps():
        loss = step["losses"].get("lm loss")
        steps[step["iteration"]] = LoggedStep(step["seconds"], float("nan") if loss is None else loss)
    if not steps:
        raise ValueError(f"{folder}: the record contains no training step; look at the logs in start-0/ranks")
    return steps


def table(runs: dict[str, dict[int, LoggedStep]]) -> list[str]:
    """Return a row of losses per step, and the median seconds per step without the first one."""
    width = max(12, *(len(name) + 2 for name in runs))
    first = next(iter(runs.values()))
    rows = ["  step" + "".join(f"{name:>{width}}" for name in runs)]
    rows += [f"{step:6d}" + "".join(f"{run[step].loss:{width}.6f}" for run in runs.values()) for step in sorted(first)]
    medians = [statistics.median([s.seconds for _, s in sorted(run.items())[1:]] or [0.0]) for run in runs.values()]
    return [*rows, "s/step" + "".join(f"{median:{width}.2f}" for median in medians)]


def main() -> int:
    """Print the table and the largest difference, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.losses", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_FOLDER")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default 1e-5)")
    args = parser.parse_args()
    try:
        runs = {name: read(Path(folder)) for name, _, folder in (given.partition("=") for given in args.runs)}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    (reference, first), *others = runs.items()
    for name, run in others:
        if run.keys() != first.keys():
            print(f"error: {name} has steps {sorted(run)}, {reference} has {sorted(first)}", file=sys.stderr)
            return 1
    print("\n".join(table(runs)))
    apart = [abs(run[step].loss / first[step].loss - 1) for _, run in others for step in first]
    beyond = [difference for difference in apart if not difference <= args.tolerance]  # NaN is beyond
    if beyond:
        print(f"error: the losses differ by {beyond[0]:.1e}, more than {args.tolerance:.0e}", file=sys.stderr)
        return 1
    print(f"the largest relative difference is {max(apart, default=0.0):.1e}, which is within rounding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
