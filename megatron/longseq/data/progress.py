"""Show the progress of data preparation: a bar on a terminal, and otherwise a line every few seconds."""

import sys
import time
from types import TracebackType
from typing import Any, Self

SECONDS_PER_LINE = 5.0


class Progress:
    """Context manager that counts work, documents and tokens and shows them.

    Args:
        what: name of the work.
        total: amount of work.
        done: work that an earlier run did. It is shown, but not counted in the rate.
        unit: unit of work. "MB" means that amounts are in bytes.
    """

    def __init__(self, what: str, total: int, done: int = 0, unit: str = "MB") -> None:
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._start = self._last_line = time.monotonic()
        self._work = self._documents = self._tokens = 0
        self._work_at_last_line = -1
        self._bar = _make_bar(sys.stdout.isatty())
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=max(self._total, 1), completed=self._done, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._work_at_last_line != self._work:
            print(self._line(), flush=True)

    def advance(self, work: int, documents: int, tokens: int) -> None:
        """Add finished work, documents and tokens.

        Args:
            work: amount of work, in `unit` (with "MB" in bytes).
            documents, tokens: how many were written.
        """
        self._work += work
        self._documents += documents
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done + self._work, figures=self._figures())
        elif time.monotonic() - self._last_line >= SECONDS_PER_LINE:
            self._last_line, self._work_at_last_line = time.monotonic(), self._work
            print(self._line(), flush=True)

    def _line(self) -> str:
        percent = 100 * (self._done + self._work) / self._total if self._total else 100.0
        return f"{self._what}: {percent:3.0f}%  {self._figures()}"

    def _figures(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = (
            f"{self._work / seconds / 1e6:.1f} MB/s"
            if self._unit == "MB"
            else f"{self._work / seconds:,.0f} {self._unit}/s"
        )
        return f"{self._documents:,} documents  {self._tokens:,} tokens  {rate}"


def _make_bar(is_terminal: bool) -> Any:
    if not is_terminal:
        return None
    try:
        from rich import progress
    except ModuleNotFoundError:  # rich is optional; lines are printed instead
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[figures]}"),
        progress.TimeRemainingColumn(),
    )
