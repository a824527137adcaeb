"""Two runs' losses side by side, from their logs.

    python -m examples.seq1f1b.losses UPSTREAM'S_LOG OURS [--tolerance 1e-5]

Ends with status 1 if a loss differs by more than the tolerance, relatively.
"""

import argparse
import re
import sys
from pathlib import Path

STEP = re.compile(r"iteration +(\d+)/ *\d+ .*?lm loss: (\S+) .*?grad norm: (\S+)")


def read(log: Path) -> dict[int, tuple[float, float]]:
    """Return per step: loss and gradient norm.

    Raises:
        ValueError: there is no step in the log.
    """
    steps = {int(match[1]): (float(match[2]), float(match[3])) for match in STEP.finditer(log.read_text())}
    if not steps:
        raise ValueError(f"{log}: no training step in it; read its end")
    return steps


def main() -> int:
    """Print the table and what follows from it."""
    parser = argparse.ArgumentParser(prog="python -m examples.seq1f1b.losses", description=__doc__)
    parser.add_argument("upstream", type=Path)
    parser.add_argument("ours", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default 1e-5)")
    args = parser.parse_args()
    try:
        upstream, ours = read(args.upstream), read(args.ours)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if upstream.keys() != ours.keys():
        print(f"error: steps {sorted(upstream)} and {sorted(ours)}: one of the runs is not whole", file=sys.stderr)
        return 1
    print("      step   loss, 1F1B   loss, Seq1F1B   relative difference   gradient norms")
    differences = []
    for step in sorted(upstream):
        one, other = upstream[step], ours[step]
        apart = abs(other[0] / one[0] - 1)
        differences.append(apart)
        print(f"      {step:4d}   {one[0]:10.6f}   {other[0]:13.6f}   {apart:19.1e}   {one[1]:6.3f} {other[1]:6.3f}")
    beyond = [apart for apart in differences if not apart <= args.tolerance]  # NaN is beyond
    if beyond:
        print(f"error: the losses differ by {beyond[0]:.1e}; rounding explains {args.tolerance:.0e}", file=sys.stderr)
        return 1
    print(f"      the largest difference is {max(differences):.1e}: rounding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
