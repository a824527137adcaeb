"""Generate user input from a seed, and check that every input is accepted or refused clearly.

A refusal is clear if a `raise` of ours or of upstream's, with a message, made it, or argparse did. An error that Python
or a library raises below (a KeyError, a bare assertion) is not.
"""

import contextlib
import io
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 300  # seconds for one input, on a machine that is busy with other things
INTEGERS = ("0", "1", "2", "3", "4", "7", "8", "64", "65", "-1", "1000000", "x", "2.5", "")
NUMBERS = ("0", "0.5", "1", "10", "60", "-1", "nan", "inf", "1e9", "x", "")
WORDS = (
    "",
    "x",
    "auto",
    "even",
    "32,32",
    "16,16,32",
    "32;32",
    "1,63",
    "0,64",
    "-1,65",
    "N",
    "NIG",
    "/dev/null",
    "é",
    ",",
)


@dataclass
class FuzzReport:
    """What became of the inputs.

    Attributes:
        accepted, refused: numbers of inputs.
        unclear: input and error of those whose refusal is not clear.
        hung: inputs that took too long.
    """

    accepted: int = 0
    refused: int = 0
    unclear: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of inputs."""
        return self.accepted + self.refused + len(self.unclear) + len(self.hung)

    def merge(self, other: "FuzzReport") -> None:
        """Add another report."""
        self.accepted, self.refused = self.accepted + other.accepted, self.refused + other.refused
        self.unclear += other.unclear
        self.hung += other.hung

    def kinds(self) -> str:
        """Return one example of each kind of unclear error."""
        found = {text.rpartition(" <- ")[0]: text for text in self.unclear}
        return "\n".join(found.values())


class Late(BaseException):
    """An input took too long."""


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(report: FuzzReport, shown: str, run: Callable[[], object]) -> None:
    """Run a check of one input, and note what became of it.

    Args:
        report: receives the result.
        shown: the input, for messages.
        run: raises if it refuses the input; an int other than 0 is a refusal whose message was printed.
    """
    output = io.StringIO()
    try:
        with _limit(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = run()
    except Late:
        report.hung.append(shown)
    except SystemExit as error:
        _note_exit(report, shown, error.code, output.getvalue())
    except BaseException as error:
        if _is_clear(error):
            report.refused += 1
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            report.unclear.append(f"{type(error).__name__}: {str(error)[:200]} ({where}) <- {shown}")
    else:
        _note_exit(report, shown, status if isinstance(status, int) else 0, output.getvalue())


def _note_exit(report: FuzzReport, shown: str, status: Any, output: str) -> None:
    if not status:
        report.accepted += 1
    elif "error" in output and "Traceback" not in output:
        report.refused += 1
    else:
        report.unclear.append(f"status {status} with {output[-200:]!r} <- {shown}")


def _is_clear(error: BaseException) -> bool:
    line = (traceback.extract_tb(error.__traceback__)[-1].line or "").strip()
    return isinstance(error, ValueError | RuntimeError) and line.startswith("raise") and len(str(error)) > 10
