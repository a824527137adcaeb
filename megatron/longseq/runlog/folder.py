"""Read what scripts/launch.sh and the ranks write into a run folder, while the run goes on or afterwards."""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron.longseq.runlog import record

Record = dict[str, Any]
TAIL_BYTES = 1 << 16
LOG_NAME = re.compile(r"rank-(\d+)-(.+)\.log")
HELD_OUT = re.compile(r"(?:validation|test) loss at iteration (\d+)( on \S+ set)?.*? \| .*?loss value: ([\d.E+-]+)")
WARNING = re.compile(r"^(> )?(WARNING|ERROR|CRITICAL|STALL)\b|^(\w+\.)*\w*(Error|Exception)\b: |^Look at ranks ")
USUAL = re.compile(r"rerun_state_machine|one_logger|IS DEPRECATED")  # upstream prints these in every run
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0e-\x1f\x7f]")  # colours and movements of a terminal
UNDECIDED_S = 60.0  # after which a job that has not said whether it is requeued was killed
QUIET_S = 600.0  # after which a run that does not end and prints nothing is suspected


class LineReader:
    """Reads the whole lines that were appended to a file since the last call.

    Args:
        file: it may not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offset = 0

    def new_lines(self) -> list[str]:
        """Return the new lines; one without an end is left for the next call.

        Raises:
            OSError: the file exists, but cannot be read.
        """
        try:
            with self.file.open("rb") as stream:
                stream.seek(self._offset)
                read = stream.read()
        except FileNotFoundError:
            return []
        whole = read[: read.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


@dataclass(frozen=True)
class End:
    """How a start ended on one node (`scripts/lib/verdict.py`).

    Attributes:
        host: the node.
        status: exit status of its launcher.
        at: Unix time.
        stopped_by: number of the signal that stopped it, or 0.
        message: why, if it failed or was stopped.
        ranks: the ranks that failed.
    """

    host: str
    status: int
    at: float
    stopped_by: int = 0
    message: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class RankLog:
    """The output of one rank of a start.

    Attributes:
        rank: global rank.
        host: its node.
        file: the log.
        written_at: Unix time of the last line.
    """

    rank: int
    host: str
    file: Path
    written_at: float


@dataclass
class Start:
    """One start of a run: `start-N` of a run folder.

    Attributes:
        number: N.
        folder: the folder.
        run: the record of kind `run`, if the training has begun.
        steps: the records of kind `step`, in the order in which they were written.
        memory: the newest record of kind `memory`.
        unreadable: lines of the record that could not be read.
        problem: what is wrong with the last of them.
    """

    number: int
    folder: Path
    run: Record | None = None
    steps: list[Record] = field(default_factory=list)
    memory: Record | None = None
    unreadable: int = 0
    problem: str = ""

    def __post_init__(self) -> None:
        self._reader = LineReader(self.folder / record.FILE)

    def refresh(self) -> None:
        """Read what has been written since the last call."""
        try:
            lines = self._reader.new_lines()
        except OSError as error:  # nothing of it is known
            self.unreadable, self.problem = max(self.unreadable, 1), f"{self._reader.file}: {error.strerror}"
            return
        for line in lines:
            try:
                values = record.from_json(line)
            except ValueError as error:
                self.unreadable, self.problem = self.unreadable + 1, str(error)
                continue
            if values["kind"] == record.RUN:
                self.run = values
            elif values["kind"] == record.MEMORY:
                self.memory = values
            elif values["kind"] == record.STEP:
                self.steps.append(values)

    @property
    def began_at(self) -> float:
        """Unix time of the start."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            first = (self.folder / "revision.txt").read_text().splitlines()[0]
            return datetime.fromisoformat(first.removeprefix("started: ").split(" on ")[0]).timestamp()
        return self.folder.stat().st_mtime

    @property
    def revision(self) -> str:
        """Return the commit, with the number of changed files, or an empty string."""
        return _revision(self.folder / "revision.txt")

    @property
    def ends(self) -> list[End]:
        """Return how the start ended on each node that has said so."""
        return [end for file in sorted(self.folder.glob("nodes/*.json")) if (end := _end(file)) is not None]

    @property
    def logs(self) -> list[RankLog]:
        """Return the logs of all ranks, in their order."""
        found = []
        for file in self.folder.glob("ranks/rank-*.log"):
            if match := LOG_NAME.fullmatch(file.name):
                found.append(RankLog(int(match[1]), match[2], file, file.stat().st_mtime))
        return sorted(found, key=lambda log: log.rank)

    @property
    def arguments(self) -> Record:
        """Return upstream's resolved arguments, or an empty mapping before they are written."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            values = json.loads((self.folder / "arguments.json").read_text())
            return values if isinstance(values, dict) else {}
        return {}

    @property
    def state(self) -> str:
        """Return in a few words what the start does, or how it ended."""
        if ends := self.ends:
            bad = [end for end in ends if end.status and not end.stopped_by] or [end for end in ends if end.status]
            if not bad:
                asked = (self.folder / "stop").exists()
                return "saved and stopped, as asked" if asked else "ended"
            return (bad[0].message.splitlines() or [f"ended with status {bad[0].status}"])[0]
        newest = max((log.written_at for log in self.logs), default=None)
        if newest is None:
            return "starting: no rank has written yet"
        silent = time.time() - newest
        if silent > QUIET_S:
            return f"silent for {silent / 60:.0f} min: it waits, or was killed together with its launcher"
        return "running" if self.steps else "starting"

    def has_ended(self) -> bool:
        """Return whether a node has said that the launch ended there."""
        return bool(self.ends)

    def is_last(self) -> bool:
        """Return whether no further start is to be expected: this one has ended, and no slurm job is requeued.

        The launcher of a job (`scripts/lib/job.py`) says so a moment after the nodes. Nothing else requeues.
        """
        outcome = _outcome(self.folder / "job.json")
        if outcome in ("requeued", "ended"):
            return outcome == "ended"
        ended_at = max((end.at for end in self.ends), default=math.inf)
        return ended_at < (math.inf if outcome is None else time.time() - UNDECIDED_S)


class RunFolder:
    """A run folder with all its starts.

    Args:
        folder: the folder. It may not exist yet.

    Attributes:
        starts: in their order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts: list[Start] = []

    def refresh(self) -> None:
        """Find new starts, and read what has been written since the last call."""
        known = {start.number for start in self.starts}
        for folder in self.folder.glob("start-*"):
            number = folder.name.removeprefix("start-")
            if number.isdecimal() and int(number) not in known and folder.is_dir():
                self.starts.append(Start(int(number), folder))
        self.starts.sort(key=lambda start: start.number)
        for start in self.starts:
            start.refresh()

    def problem(self) -> str:
        """Return why there is nothing to show, and what to do, or an empty string."""
        if not self.folder.exists():
            return f"there is no folder {self.folder}; give the run folder that scripts/launch.sh printed"
        if not self.folder.is_dir():
            return f"{self.folder} is not a folder; give the run folder that scripts/launch.sh printed"
        if self.starts:
            return ""
        if not os.access(self.folder, os.R_OK | os.X_OK):
            return f"{self.folder}: this user may not read the folder"
        if any(self.folder.glob("code*")):
            return f"{self.folder}: the job has been submitted and has not begun"
        hint = "give the run folder that holds it" if self.folder.name.startswith("start-") else "give a run folder"
        return f"{self.folder} holds no start of scripts/launch.sh (start-0); {hint}"

    def damaged(self) -> str:
        """Return how many lines of the record cannot be read, and why not the last one, or an empty string."""
        count = sum(start.unreadable for start in self.starts)
        problem = next((start.problem for start in reversed(self.starts) if start.problem), "")
        return f"{count} line{'s' if count > 1 else ''} of {record.FILE} cannot be read: {problem}" if count else ""

    def may_begin(self) -> bool:
        """Return whether a start may still appear: the folder is no file, and no start itself."""
        is_start = any((self.folder / name).is_dir() for name in ("ranks", "nodes"))
        return not is_start and (self.folder.is_dir() or not self.folder.exists())

    def steps(self) -> list[Record]:
        """Return the records of the steps of all starts; steps that a later start repeats are those of the later."""
        merged: list[Record] = []
        for start in self.starts:
            if start.steps:
                first = start.steps[0]["iteration"] - start.steps[0].get("steps", 1)
                while merged and merged[-1]["iteration"] > first:
                    merged.pop()
                merged += start.steps
        return merged

    def held_out(self) -> dict[str, list[tuple[int, float]]]:
        """Return the losses of evaluations by step, by the set's name, as upstream prints them on the last rank."""
        found: dict[str, dict[int, float]] = {}
        for start in self.starts:
            for line in _lines(start.logs[-1].file) if start.logs else ():
                if match := HELD_OUT.search(line):
                    # At the end of a run upstream evaluates again, on other batches.
                    name = (match[2] or " on validation set").removeprefix(" on ")
                    if match[2] and int(match[1]) in found.get(name, {}):
                        continue
                    with contextlib.suppress(ValueError):
                        found.setdefault(name, {})[int(match[1])] = float(match[3])
        return {name: sorted(values.items()) for name, values in found.items()}

    def warnings(self, most: int) -> list[str]:
        """Return the last distinct warnings and errors of the first and the last rank of the newest start.

        Args:
            most: number of them.
        """
        if not self.starts:
            return []
        logs = self.starts[-1].logs
        failed = {rank for end in self.starts[-1].ends for rank in end.ranks}
        chosen = {log.rank: log for log in logs if log.rank in failed} | {
            log.rank: log for log in (logs[:1] + logs[-1:])
        }
        found: dict[str, None] = {}
        for log in chosen.values():
            for line in _tail(log.file):
                if WARNING.search(line) and not USUAL.search(line):
                    found[f"rank {log.rank}: {line.removeprefix('> ')}"] = None
        return list(found)[-most:]

    def timeline_folder(self) -> Path | None:
        """Return the newest folder of a measured pipeline step, or None: of the record, else of --pipeline-trace."""
        for start in reversed(self.starts):
            measured = sorted(start.folder.glob("timeline/step-*"))
            given = start.arguments.get("pipeline_trace")
            candidates = [*reversed(measured), *([Path(given)] if given and isinstance(given, str) else [])]
            for folder in candidates:
                if any(folder.glob("rank-*.json")):
                    return folder
        return None


def _end(file: Path) -> End | None:
    try:
        values = json.loads(file.read_text())
        ranks = tuple(sorted({int(one["rank"]) for one in values["failures"] if not one["stopped"]}))
        at = float(values["ended_at"])
        at = at if math.isfinite(at) and at > 0 else file.stat().st_mtime
        status, stopped_by = int(values["status"]), int(values["stopped_by"])
        return End(str(values["host"]), status, at, stopped_by, str(values["message"]), ranks)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _outcome(file: Path) -> str | None:
    """Return what the launcher of a slurm job says about it; None: there is no job."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return ""
    return str(values.get("outcome", "")) if isinstance(values, dict) else ""


def _revision(file: Path) -> str:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return ""
    commit = next((line.split(": ")[1] for line in lines if line.startswith("revision: ")), "")
    changed = sum(line.startswith("changed: ") for line in lines)
    return commit[:12] + (f" and {changed} changed files" if changed else "")


def _lines(file: Path) -> Iterator[str]:
    with contextlib.suppress(OSError), file.open(errors="replace") as stream:
        yield from stream


def _tail(file: Path) -> list[str]:
    """Return the last lines of a file, without the prefix of the rank."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [re.sub(r"^\[rank\d+\]: ?", "", CONTROL.sub("", line)).rstrip() for line in text.splitlines()]
