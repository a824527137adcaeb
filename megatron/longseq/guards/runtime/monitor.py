"""Watch for a stall: report what every rank waits for, and end the job within a set time.

Each rank has a thread that publishes a heartbeat, and sees whether the training makes progress. When one rank stalls,
all ranks report through torchrun's store, so that a report can say for every rank where it is: the one that waits for
nobody is the cause. A rank that does not report is stopped, dead, or cut off.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron.longseq.guards.runtime import waits

KEY = "longseq/guards"
STATUS = 75  # of a process that the monitor ends
COLLECT = 15.0  # seconds in which the other ranks report; less if all have done so
RECORD = 30.0  # seconds in which a rank has written its record, or ends without
SHORTEST_BEAT, LONGEST_BEAT = 0.2, 10.0  # seconds
SUSPENDED = 4.0  # beats; a sleep of one beat that takes as long was no sleep: the process was stopped


class Store(Protocol):
    """What is used of torch.distributed's stores."""

    def set(self, key: str, value: str, /) -> None:
        """Set a value."""

    def get(self, key: str, /) -> bytes:
        """Return a value."""

    def check(self, keys: list[str], /) -> bool:
        """Return whether all keys have values."""


@dataclass
class StepProgress:
    """How far this rank is. The training writes it, one attribute at a time; the monitor reads it.

    Attributes:
        steps: training steps that have begun in this process.
        at: time of the last sign of progress.
        iteration: number of the step in the run, from 1.
        is_over: whether the run is over or has failed, and is not watched any more.
    """

    steps: int = 0
    at: float = field(default_factory=time.monotonic)
    iteration: int = 0
    is_over: bool = False

    def mark(self) -> None:
        """Note progress."""
        self.at = time.monotonic()

    def begin_step(self, iteration: int) -> None:
        """Note the beginning of a training step."""
        self.steps, self.iteration = self.steps + 1, iteration
        self.mark()


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end_process() -> None:
    os._exit(STATUS)  # the main thread cannot be interrupted: it waits in a backend


@dataclass
class StallMonitor:
    """Watches the main thread of this rank.

    Attributes:
        rank: global rank.
        ranks: number of ranks.
        store: reached by all ranks; None or unreachable: this rank reports for itself.
        progress: of this rank.
        in_steps: seconds without progress in a step or an evaluation that are a stall; 0: never.
        elsewhere: the same before the end of the first step and while checkpoints are saved or loaded.
        on_gpu: whether the ranks compute on GPUs, for which their hosts wait in any line that reads a result.
        say: receives reports.
        record: writes what the devices did, and returns a line for the log, or None.
        end: ends this process.
        prepare: called first in the thread.
    """

    rank: int
    ranks: int
    store: Store | None
    progress: StepProgress
    in_steps: float
    elsewhere: float
    on_gpu: bool = False
    say: Callable[[str], None] = _to_stderr
    record: Callable[[], str | None] = lambda: None
    end: Callable[[], None] = _end_process
    prepare: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._part = waits.OUTSIDE
        shortest = min(limit for limit in (self.in_steps, self.elsewhere) if limit)
        self.beat = min(max(shortest / 20, SHORTEST_BEAT), LONGEST_BEAT)

    def start(self) -> None:
        """Start the thread, a daemon."""
        self._thread = threading.Thread(target=self._run, name="longseq-stall-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        faulthandler.cancel_dump_traceback_later()

    def stalled_for(self) -> float | None:
        """Return how long this rank has made no progress, in seconds, if that is a stall."""
        waited = time.monotonic() - self.progress.at
        if self.progress.is_over or waited < min(limit for limit in (self.in_steps, self.elsewhere) if limit):
            return None
        limit = self._limit()
        return waited if limit and waited >= limit else None

    def _limit(self) -> float:
        part = waits.part_of_run(self._frame())
        if part == waits.OUTSIDE and self.progress.steps > 1:
            return 0.0  # a script may have more to do after its training
        return self.elsewhere if self.progress.steps <= 1 or part in waits.SLOW_PARTS else self.in_steps

    def _frame(self) -> Any:
        return sys._current_frames().get(self._main or 0)

    def _run(self) -> None:
        self.prepare()
        while not self._sleep():
            self._publish("beat", self.own_state(is_beat=True))
            self._guard_the_interpreter()
            if self.stalled_for() is not None or self._is_reported():
                self.report_and_end()
                return

    def _sleep(self) -> bool:
        """Sleep for a beat; return whether the monitor is closed. Leave out time that is no stall of this step."""
        began = time.monotonic()
        is_closed = self._stop.wait(self.beat)
        now = time.monotonic()
        part, before = waits.part_of_run(self._frame()), self._part
        self._part = part
        if part != before and before in waits.SLOW_PARTS:
            self.progress.mark()  # a save may take longer than a step may, and the step after it has just begun
        elif now - began > SUSPENDED * self.beat:  # the system had stopped this process, with all its threads
            self.progress.at = min(now, self.progress.at + now - began)
        return is_closed

    def _guard_the_interpreter(self) -> None:
        """If code that holds the interpreter's lock hangs, no Python thread runs; faulthandler's thread then acts."""
        limits = (self.in_steps, self.elsewhere)
        if all(limits) and not self._stop.is_set():  # what is set after `close` would end the process
            faulthandler.dump_traceback_later(max(limits) + 3 * self.beat, exit=True)

    def own_state(self, *, is_beat: bool = False) -> dict[str, Any]:
        """Return where this rank is: with its host, process, step, and what it waits for.

        Args:
            is_beat: while the training makes progress, return the line of code alone. Python keeps the local variables
                that someone has read until their function returns, and with them the memory of activations.
        """
        frame = self._frame()
        is_at_work = is_beat and time.monotonic() - self.progress.at < self.beat
        describe = waits.describe_line if is_at_work else waits.describe_wait
        state = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self.progress.iteration,
            "part": waits.part_of_run(frame),
            "seconds": round(time.monotonic() - self.progress.at, 1),
            "wait": describe(frame),
        }
        threads = () if is_at_work else threading.enumerate()
        beside = [
            f"{thread.name}: {waits.describe_wait(sys._current_frames().get(thread.ident))}"
            for thread in threads
            if thread.name.startswith("paro-") and thread.ident is not None
        ]
        return {**state, "beside": [text for text in beside if "waits" in text]}

    def report_and_end(self) -> None:
        """Report on this rank, then on all ranks, and end the process. The lowest rank that reports speaks for all."""
        self._write_record()  # first, because the process that ends first lets torchrun end the others
        self._publish("stall", self.own_state())
        self.say(f"rank {self.rank}: the job makes no progress; the stacks of this rank's threads follow.")
        _dump_stacks()
        reports = self._collect()
        present = [rank for rank, report in reports.items() if report is not None]
        is_first = not present or self.rank == min(present)
        if not is_first:
            time.sleep(2.0)  # the first one's report is to stand alone at the end of the log
        if is_first or not self._published("verdict", 0):
            self._publish("verdict", {"rank": self.rank}, 0)
            self.say(self.verdict(reports))
        self.end()

    def _write_record(self) -> None:
        """Write the record; end the process if that hangs, as a driver may that is asked for its events."""
        faulthandler.dump_traceback_later(RECORD, exit=True)
        try:
            line = self.record()
        except Exception as error:  # the reports matter more
            line = f"its last operations are not written ({type(error).__name__}: {error})"
        faulthandler.cancel_dump_traceback_later()
        if self._thread is not None:
            self._guard_the_interpreter()
        if line is not None:
            self.say(f"rank {self.rank}: {line}")

    def _collect(self) -> dict[int, dict[str, Any] | None]:
        """Wait for the reports of the other ranks, and return what there is."""
        deadline = time.monotonic() + max(COLLECT, 3 * self.beat)
        keys = [f"{KEY}/stall/{rank}" for rank in range(self.ranks)]
        while self.store is not None and time.monotonic() < deadline and not self._ask(lambda store: store.check(keys)):
            time.sleep(SHORTEST_BEAT)
        return {rank: self._published("stall", rank) for rank in range(self.ranks)}

    def verdict(self, reports: dict[int, dict[str, Any] | None]) -> str:
        """Describe a stall of the job.

        Args:
            reports: what each rank reports; None: it does not.
        """
        lines = ["STALL: the job makes no progress and is ended. What each rank does:"]
        for rank, report in reports.items():
            lines.append(f"  rank {rank}{_one(report)}" if report else self._silent(rank))
        silent = [rank for rank, report in reports.items() if report is None]
        idle = [rank for rank, report in reports.items() if report and "waits" not in report["wait"]]
        unheard = [rank for rank in silent if self._published("beat", rank) is None]
        if self.store is None or 0 < self.ranks - 1 == len(unheard):
            lines.append("The other ranks could not be asked: look at the end of their logs.")
        elif silent:
            lines.append(f"Look at ranks {_list(silent)} first: they do not answer.")
        elif idle and self.on_gpu:
            lines.append(
                f"Ranks {_list(idle)} compute, or wait in this line for their GPU, which may wait for another rank. "
                "Look first at a rank whose step or line differs from that of the others."
            )
        elif idle:
            lines.append(f"Look at ranks {_list(idle)} first: they wait for no other rank.")
        lines.append(
            f"The limits are --stall-timeout-minutes {self.in_steps / 60:g} and --first-step-timeout-minutes "
            f"{self.elsewhere / 60:g}. Every rank's log ends with the stacks of its threads. Resume from the last "
            "checkpoint."
        )
        return "\n".join(lines)

    def _silent(self, rank: int) -> str:
        beat = self._published("beat", rank)
        seen = f"; its last heartbeat:{_one(beat)}" if beat else ", nor has it ever"
        return f"  rank {rank}: does not report: it is stopped, dead or cut off{seen}"

    def _is_reported(self) -> bool:
        return self._ask(lambda store: store.check([f"{KEY}/stall"])) or False

    def _publish(self, kind: str, value: dict[str, Any], rank: int | None = None) -> None:
        place = f"{KEY}/{kind}/{self.rank if rank is None else rank}"
        self._ask(lambda store: store.set(place, json.dumps(value)))
        if kind == "stall":
            self._ask(lambda store: store.set(f"{KEY}/stall", str(self.rank)))

    def _published(self, kind: str, rank: int) -> dict[str, Any] | None:
        place = f"{KEY}/{kind}/{rank}"
        if not self._ask(lambda store: store.check([place])):
            return None
        value = self._ask(lambda store: store.get(place))
        return json.loads(value) if value else None

    def _ask(self, request: Callable[[Any], Any]) -> Any:
        if self.store is None:
            return None
        try:
            return request(self.store)
        except Exception as error:  # its host is gone: the report is needed all the more
            self.say(f"rank {self.rank}: the stall monitor lost the store ({type(error).__name__})")
            self.store = None
            return None


def _one(report: dict[str, Any]) -> str:
    beside = "".join(f"\n      beside it, {text}" for text in report["beside"])
    return (
        f" ({report['host']}, pid {report['pid']}): step {report['step']}, {report['part']}, no progress for "
        f"{report['seconds']:g} s: {report['wait']}{beside}"
    )


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (" ..." if len(ranks) > 16 else "")


def _dump_stacks() -> None:
    try:
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    except (OSError, ValueError, RuntimeError):  # no file descriptor behind it
        faulthandler.dump_traceback(file=2, all_threads=True)
