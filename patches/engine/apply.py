"""Apply records, all or none, and undo them exactly, in reverse order.

No state lives here: `apply` returns an `Applied`, which knows how to undo itself. `patches.engine.session` remembers
what is active in the process.
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from patches.engine import alias_scan as aliases
from patches.engine.place import Place, bad, implementation, like, module, resolve, underlying, wrapped
from patches.errors import Conflict, Drift, ForeignChange, PatchError, StaleAlias, UnknownTarget
from patches.ledger import refuse_conflicts
from patches.record import Record, is_upstream
from patches.upstream.lock import Lock, read
from patches.upstream.source import Upstream


@dataclass(frozen=True)
class Binding:
    """A place that was set.

    Attributes:
        record: the record that set it.
        place: the place.
        before: its `__dict__` entry before; ABSENT if there was none.
        after: the entry that we set.
    """

    record: Record
    place: Place
    before: Any
    after: Any


@dataclass(eq=False)
class Applied:
    """The changes of one `apply`. `undo` reverts them; a second `undo` does nothing.

    Attributes:
        records: the records that were applied, in order.
        fingerprints: fingerprint of every upstream place of the records.
        bindings: places that were set, in order.
        contexts: records whose context managers were entered, in order.
        originals: objects that were replaced.
    """

    records: tuple[Record, ...]
    fingerprints: dict[str, str]
    bindings: list[Binding] = field(default_factory=list)
    contexts: list[Record] = field(default_factory=list)
    originals: list[aliases.Original] = field(default_factory=list)
    _undo: ExitStack = field(default_factory=ExitStack)

    def undo(self) -> None:
        """Restore every place and leave every context, in reverse order.

        Raises:
            ForeignChange: a place no longer holds our object; then nothing is touched.
            StaleAlias: everything is restored, but a module that was imported meanwhile still holds our object.
        """
        self._refuse_foreign_changes()
        wraps = [b for b in self.bindings if b.record.action in ("wrap", "hook")]
        ours = [aliases.Original(b.record, b.after, underlying(b.after)) for b in wraps]
        self.roll_back()
        leftovers = aliases.scan(ours)
        if leftovers:
            raise _stale(
                leftovers, "our object is still in use after the undo", "it was imported while the patch was applied"
            )

    def _refuse_foreign_changes(self) -> None:
        last = {binding.place.key: binding for binding in self.bindings}
        for binding in last.values():
            if binding.place.own() is not binding.after:
                raise ForeignChange(
                    f"{binding.place.label} no longer holds the object that {binding.record.id} put there",
                    where=binding.place.file(),
                    why=f"it now holds {binding.place.own()!r}, so restoring the original would drop that change",
                    todo="undo the later change first (patches are undone in the reverse order of their application)",
                )

    def roll_back(self) -> None:
        """Restore without checks. Raise the error of a context that fails to exit after everything else is restored."""
        try:
            self._undo.close()
        finally:
            self.bindings.clear()
            self.contexts.clear()

    def bind(self, record: Record, place: Place, value: Any) -> None:
        """Set a place and record its previous entry.

        Args:
            record: the record that asks for it.
            place: the place.
            value: the raw entry to set, for instance a `staticmethod`; ABSENT deletes it.
        """
        before = place.own()
        place.put(value)
        self._undo.callback(place.put, before)
        self.bindings.append(Binding(record, place, before, value))

    def enter(self, record: Record) -> None:
        """Enter the context manager that a `context` record's implementation returns.

        Raises:
            BadImplementation: the implementation returns no context manager, or cannot be loaded.
            UnknownTarget: there is no such module.
        """
        if not is_upstream(record.target):  # upstream's module is known from its fingerprint, and not imported yet
            module(record.target)
        manager = implementation(record)()
        if not isinstance(manager, AbstractContextManager):
            raise bad(f"{record.id} returns no context manager", record.impl, f"it returned a {type(manager).__name__}")
        self._undo.enter_context(manager)
        self.contexts.append(record)


def apply(
    records: Sequence[Record],
    *,
    active: Sequence[Record] = (),
    lock: Lock | None = None,
    upstream: Upstream | None = None,
) -> Applied:
    """Apply records in the given order. Undo all of them if one fails.

    All checks that need no import come first: conflicts, then the fingerprint of every upstream place. The modules of
    targets and aliases are imported as each record's turn comes, so a `context` that has to be in place before
    upstream is imported only has to come first.

    Args:
        records: what to apply; those in `active` already are skipped, and so are hooks whose callbacks are.
        active: what other calls have applied and not undone.
        lock: fingerprints that the sources must match; None: those of upstream.lock.
        upstream: reads the sources; None: from where `import` finds them.

    Raises:
        PatchError: says what was refused, where, why and what to do.
    """
    todo = [record for record in records if not any(_holds(one, record) for one in active)]
    refuse_conflicts([*active, *todo])
    applied = Applied(tuple(todo), verified(todo, lock, upstream or Upstream()))
    try:
        for record in todo:
            _carry_out(applied, record)
        hits = aliases.scan(applied.originals, _installed(applied))
        if hits:
            raise _stale(hits, "the original is still in use under another name", "it would bypass the patch")
    except BaseException as error:
        applied.roll_back()
        if isinstance(error, PatchError) or not isinstance(error, Exception):
            raise
        raise bad("a patch could not be applied", _at(applied, todo), f"{type(error).__name__}: {error}") from error
    return applied


def _holds(active: Record, record: Record) -> bool:
    return active.id == record.id and {part.id for part in record.parts} <= {part.id for part in active.parts}


def verified(records: Sequence[Record], lock: Lock | None, upstream: Upstream) -> dict[str, str]:
    """Return the fingerprint of each upstream place of the records. All of them must match the lock; imports nothing.

    Args:
        records: records to check.
        lock: the fingerprints; None reads upstream.lock when first needed.
        upstream: the symbols of the tree that would be patched.

    Raises:
        Drift: a source differs from the lock.
        UnknownTarget: a place is gone.
    """
    found = {}
    for record in records:
        for place in record.upstream_places:
            lock = lock or read()
            try:
                symbol = upstream.symbol(place)
                lock.check(symbol)
            except (Drift, UnknownTarget) as error:
                error.about(record.id)
                raise
            found[place] = symbol.fingerprint
    return found


def _carry_out(applied: Applied, record: Record) -> None:
    if record.action == "context":
        applied.enter(record)
        return
    target = resolve(record.target)
    raw = target.raw()
    core = underlying(raw)
    new = implementation(record) if record.action == "replace" else wrapped(record, core)
    value = like(raw, new)
    if value is raw:
        raise bad(f"{record.id} does not change its target", record.impl, "the implementation is the original")
    places = [target, *(_alias(label, record, raw, core) for label in record.aliases)]
    _refuse_second_patch(applied, record, places)
    if target.own() is raw:  # an inherited object stays in the base class, which is right
        applied.originals.append(aliases.Original(record, raw, core))
    for place in places:
        holds_core = place.own() is core and core is not raw
        applied.bind(record, place, underlying(value) if holds_core else value)


def _refuse_second_patch(applied: Applied, record: Record, places: Sequence[Place]) -> None:
    """Refuse a place that has two labels (a class under two modules). Comparing labels does not find it."""
    by_place = {binding.place.key: binding for binding in applied.bindings}
    for place in places:
        if place.key in by_place:
            other = by_place[place.key]
            raise Conflict(
                f"{other.record.id} and {record.id} cannot both patch {place.label}",
                where=place.file(),
                why=f"{other.place.label} is the same place, and a place can have one patch only",
                todo="make both of them callbacks of one hook (patches/hooks.py)",
            )


def _installed(applied: Applied) -> frozenset[int]:
    return frozenset(id(thing) for b in applied.bindings for thing in (b.after, underlying(b.after)))


def _alias(label: str, record: Record, raw: Any, core: Any) -> Place:
    """Resolve a declared alias. It must refer to the same object as the target."""
    place = resolve(label)
    if place.own() is not raw and place.own() is not core:
        raise UnknownTarget(
            f"{label} is not an alias of {record.target}",
            where=place.file(),
            why=f"it holds {place.raw()!r}, not the target's object",
            todo=f"correct the aliases of {record.id}, or undo whoever changed one of the two",
        )
    return place


def _at(applied: Applied, todo: Sequence[Record]) -> str:
    done = {b.record.id for b in applied.bindings} | {record.id for record in applied.contexts}
    late = (f"{r.id} ({', '.join(part.impl for part in r.parts)})" for r in todo if r.id not in done)
    return next(late, "the alias scan")


def _stale(hits: list[aliases.Hit], what: str, why: str) -> StaleAlias:
    lines = [f"{hit.record.id}: {hit.name} ({_file(hit.module)})" for hit in hits]
    return StaleAlias(
        what,
        where="\n         ".join(lines),
        why=why,
        todo="declare it in the record's `aliases` if it is upstream's; in your own script, import the module instead "
        "of the name, or import the name after the patches are applied",
    )


def _file(module: str) -> str:
    return getattr(sys.modules.get(module), "__file__", None) or module
