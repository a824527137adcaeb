"""How a section tells what it found: one JSON object a line, at once, so that one that is stopped loses nothing."""

import json
import sys
from typing import Any

SKIPPED = "skipped"  # the figure whose text says why a step had nothing to do here


class Report:
    """Prints findings; knows in the end whether all of them were right."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def tell(self, name: str, **figures: Any) -> None:
        """Print one finding; `right=False` among its figures makes the step a failed one."""
        if figures.get("right") is False:
            self.wrong.append(name)
        print(json.dumps({name: figures}), flush=True)

    def status(self) -> int:
        """Return the exit status: 1 where something was wrong, which is said on stderr."""
        if self.wrong:
            print(f"error: wrong: {', '.join(self.wrong)}", file=sys.stderr)
        return int(bool(self.wrong))


def skip(why: str) -> int:
    """Print why there is nothing to do, and return the exit status."""
    print(json.dumps({SKIPPED: why}), flush=True)
    return 0


def read(output: str) -> dict[str, Any]:
    """Return the figures among a section's lines; a later one of the same name counts."""
    figures: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue  # cut in the middle
            if isinstance(found, dict):
                figures |= found
    return figures
