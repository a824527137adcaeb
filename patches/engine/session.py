"""The patches applied in this process. `SESSION` is the only state of this package."""

import atexit
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from patches import ledger
from patches.engine import apply as engine
from patches.engine import digest
from patches.engine.place import load
from patches.errors import PatchError
from patches.record import Callback, Record, Stage
from patches.upstream.lock import Lock


class Session:
    """A stack of applied sets of one ledger, and the state of their implementations.

    Args:
        records: the ledger to choose from.
        lock: the fingerprints; None reads upstream.lock when first needed.

    Attributes:
        state: what the implementation of a record or callback keeps from call to call, under its id. An undo drops the
            state of what it undoes, and calls the `close` method of a state that has one.
    """

    def __init__(self, records: Sequence[Record] = ledger.RECORDS, lock: Lock | None = None) -> None:
        self.ledger, self.lock = tuple(records), lock
        self.stack: list[engine.Applied] = []
        self.state: dict[str, Any] = {}
        self._stages: dict[Stage, engine.Applied] = {}

    @property
    def records(self) -> tuple[Record, ...]:
        """Return the active records in the order of their application."""
        return tuple(record for applied in self.stack for record in applied.records)

    @property
    def hashes(self) -> dict[str, str]:
        """Return the hash of each active record and callback, see `patches.engine.digest.hashes`."""
        return digest.hashes(self.stack)

    def apply(self, records: Sequence[Record]) -> engine.Applied:
        """Apply the records that are not active yet. See `patches.engine.apply.apply` for the errors."""
        applied = engine.apply(records, active=self.records, lock=self.lock)
        self.stack.append(applied)
        return applied

    def undo(self, applied: engine.Applied) -> None:
        """Undo a set. Undo later sets that share a place with it first; otherwise this raises ForeignChange."""
        if applied not in self.stack:
            return
        try:
            applied.undo()
        finally:
            if not applied.bindings and not applied.contexts:
                self._drop_state(applied)
                self.stack.remove(applied)
                self._stages = {stage: a for stage, a in self._stages.items() if a is not applied}

    def _drop_state(self, applied: engine.Applied) -> None:
        for part in (part for record in applied.records for part in record.parts):
            close = getattr(self.state.pop(part.id, None), "close", None)
            if close is not None:
                close()

    def leave(self) -> None:
        """Restore everything without checks, at the end of the process.

        A context manager that Python finds open when it takes its modules down fails there, with a traceback on stderr.
        """
        while self.stack:
            applied = self.stack.pop()
            applied.roll_back()
            self._drop_state(applied)

    def start(self) -> engine.Applied:
        """Apply the records of stage `start` that this machine needs. Call it before upstream is imported.

        A second call returns the first one's handle.
        """
        return self._stage("start", None)

    def select_and_apply(self, args: Namespace) -> engine.Applied:
        """Apply the records of stage `flags` that the parsed arguments ask for. Repeating the same choice does nothing.

        Raises:
            PatchError: patches were chosen before in this process, for arguments that ask for others.
        """
        return self._stage("flags", args)

    def _stage(self, stage: Stage, args: Namespace | None) -> engine.Applied:
        done = self._stages.get(stage)
        selected = select([record for record in self.ledger if record.stage == stage], args)
        if done is None:
            done = self._stages[stage] = self.apply(selected)
        elif not set(done.records) <= set(selected) <= set(self.records):
            raise PatchError(
                "the patches of this process were already chosen, for different flags",
                where=" ".join(sys.argv[:1]) or "this process",
                why=f"chosen: {_ids(done.records)}; the flags now ask for: {_ids(selected)}",
                todo="parse one set of flags per process; in tests, use `with patches.applied(...)`",
            )
        return done


def select(records: Sequence[Record], args: Namespace | None) -> list[Record]:
    """Select the records whose predicates accept these arguments; of a hook, the callbacks whose predicates do.

    Args:
        records: records to choose from.
        args: parsed arguments; None for records of stage `start`.

    Raises:
        PatchError: a predicate cannot be loaded, or failed on these arguments.
    """
    found = (record.only(tuple(part for part in record.parts if accepts(part, args))) for record in records)
    return [record for record in found if record is not None]


def accepts(part: Record | Callback, args: Namespace | None) -> bool:
    """Call the predicate of a record or callback.

    Args:
        part: the record or callback.
        args: parsed arguments; None for records of stage `start`.

    Raises:
        PatchError: the predicate cannot be loaded, or failed on these arguments.
    """
    predicate = load(part.when, f"the predicate of {part.id}")
    try:
        return bool(predicate(args))
    except Exception as error:
        raise PatchError(
            f"the predicate of {part.id} failed",
            where=part.when,
            why=f"{type(error).__name__}: {error}",
            todo="correct the predicate; it must work for every set of parsed arguments",
        ) from error


def _ids(records: Sequence[Record]) -> str:
    return ", ".join(part.id for record in records for part in record.parts) or "none"


SESSION = Session()


def start() -> engine.Applied:
    """Call `Session.start` of this process, and restore everything when the process ends."""
    atexit.unregister(SESSION.leave)  # a second call must not register it twice
    atexit.register(SESSION.leave)
    return SESSION.start()


def select_and_apply(args: Namespace) -> engine.Applied:
    """Call `Session.select_and_apply` of this process."""
    return SESSION.select_and_apply(args)


@contextmanager
def applied(records: Sequence[Record | str] | Record | str, args: Namespace | None = None) -> Iterator[engine.Applied]:
    """Apply records (or ids of the ledger) inside a `with` block.

    Args:
        records: what to apply, in this order.
        args: when given, only the records and callbacks whose predicate accepts these arguments.
    """
    listed = [records] if isinstance(records, Record | str) else records
    named = ledger.merged([ledger.by_id(r) if isinstance(r, str) else r for r in listed])
    handle = SESSION.apply(named if args is None else select(named, args))
    try:
        yield handle
    finally:
        SESSION.undo(handle)
