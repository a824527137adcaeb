"""All records, in the order they are applied: systems from the inside out, within a system as it lists them."""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from patches import (
    checkpoint,
    cpu,
    cross_entropy,
    data,
    dryrun,
    entry,
    flexsp,
    guards,
    hooks,
    local,
    log,
    packed,
    paro,
    recompute,
    seq1f1b,
    usp,
)
from patches.errors import Conflict, LedgerError
from patches.record import Callback, Record


def with_callbacks(records: Iterable[Record], callbacks: Iterable[Callback]) -> tuple[Record, ...]:
    """Give every hook its callbacks, in the order in which they are listed.

    Args:
        records: records of all systems.
        callbacks: callbacks of all hooks, the innermost first.

    Raises:
        LedgerError: a callback names no hook, or a hook has no callback.
    """
    records, callbacks = tuple(records), tuple(callbacks)
    known = {record.id for record in records if record.action == "hook"}
    for callback in callbacks:
        if callback.hook not in known:
            raise _wrong(callback, f"there is no hook {callback.hook!r}", f"name one of {', '.join(sorted(known))}")
    joined = []
    for record in records:
        own = tuple(callback for callback in callbacks if callback.hook == record.id)
        if record.action == "hook" and not own:
            raise _wrong(record, "no system registers a callback", "remove the hook")
        joined.append(replace(record, callbacks=own) if own else record)
    return tuple(joined)


def checked(records: Iterable[Record]) -> tuple[Record, ...]:
    """Check that the records do not contradict each other, and return them as a tuple.

    Raises:
        LedgerError: an id twice, or an implementation or predicate in a module that does not exist.
        Conflict: two records claim one place, see `refuse_conflicts`.
    """
    records = tuple(records)
    seen: set[str] = set()
    for record in records:
        for part in dict.fromkeys((record, *record.parts)):
            if part.id in seen:
                raise _wrong(part, "its id is not unique", "rename one of the two")
            seen.add(part.id)
        for part in record.parts:
            for name, place in (("impl", part.impl), ("when", part.when)):
                module = place.partition(":")[0]
                if not _exists(module):
                    raise _wrong(part, f"{name} names module {module}, which does not exist", f"correct its {name}")
    refuse_conflicts(records)
    return records


def refuse_conflicts(records: Sequence[Record]) -> None:
    """Refuse two records on one place: what several systems do at one upstream function are callbacks of one hook.

    Raises:
        Conflict: two records share a place (a target or an alias).
    """
    holders: dict[str, Record] = {}
    for record in records:
        if record.action == "context":
            continue
        for place in record.places:
            earlier = holders.setdefault(place, record)
            if earlier is not record:
                raise Conflict(
                    f"{earlier.id} and {record.id} cannot both patch {place}",
                    where=f"patches.{earlier.system} and patches.{record.system}",
                    why="a place can have one patch only; a hook defines the order in which systems act there",
                    todo="make both of them callbacks of one hook (patches/hooks.py), and apply them together",
                )


def _exists(module: str) -> bool:
    """Return whether a module exists. Modules of this package are looked up as files, so nothing is imported."""
    top, _, rest = module.partition(".")
    if top == __package__ and rest:
        path = Path(__file__).parent.joinpath(*rest.split("."))
        return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    return importlib.util.find_spec(top) is not None


def _wrong(part: Record | Callback, why: str, todo: str) -> LedgerError:
    return LedgerError(f"patch {part.id} is wrong", where=f"patches.{part.system}", why=why, todo=todo)


def by_id(identifier: str) -> Record:
    """Return the record with this id, or the hook of the callback with this id, with only that callback.

    Raises:
        LedgerError: there is none; the message lists what there is.
    """
    for record in RECORDS:
        if record.id == identifier:
            return record
        found = record.only(tuple(part for part in record.parts if part.id == identifier))
        if found is not None:
            return found
    raise LedgerError(
        f"there is no patch {identifier!r}",
        where="the ledger",
        why=f"the patches are {', '.join(dict.fromkeys(i for r in RECORDS for i in (r.id, *(p.id for p in r.parts))))}",
        todo="list them: python -m patches list",
    )


def merged(records: Iterable[Record]) -> list[Record]:
    """Merge records of the same hook, which may have different callbacks, in the ledger's order of callbacks."""
    found: dict[str, Record] = {}
    for record in records:
        earlier = found.get(record.id, record)
        both = by_id(record.id).only((*earlier.parts, *record.parts)) if earlier.parts != record.parts else None
        found[record.id] = both or record
    return list(found.values())


_SYSTEMS = (
    cpu,
    local,
    entry,
    dryrun,
    data,
    checkpoint,
    log,
    recompute,
    seq1f1b,
    usp,
    packed,
    paro,
    cross_entropy,
    guards,
    flexsp,
)

RECORDS: tuple[Record, ...] = checked(
    with_callbacks(
        (*cpu.RECORDS, *local.RECORDS, *hooks.RECORDS, *(r for system in _SYSTEMS[2:] for r in system.RECORDS)),
        (callback for system in _SYSTEMS for callback in getattr(system, "CALLBACKS", ())),
    )
)
