"""All records, in the order they are applied: systems from the inside out, within a system as it lists them."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from patches import checkpoint, cpu, data, entry, local, log, paro, recompute, seq1f1b, usp
from patches.errors import Conflict, LedgerError
from patches.record import Record


def checked(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records as a tuple, once they are known not to contradict each other.

    Raises:
        LedgerError: an id twice, or an implementation or predicate in a module that does not exist.
        Conflict: two records claim one place, see `refuse_conflicts`.
    """
    records = tuple(records)
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise _wrong(record, "its id is used twice", "rename one of the two")
        seen.add(record.id)
        for name, place in (("impl", record.impl), ("when", record.when)):
            module = place.partition(":")[0]
            if not _exists(module):
                raise _wrong(record, f"{name} names module {module}, which does not exist", f"correct its {name}")
    refuse_conflicts(records)
    return records


def refuse_conflicts(records: Sequence[Record]) -> None:
    """Refuse sets of which one member would silently drop another.

    Raises:
        Conflict: two replacements of one place (a target or an alias), a replacement after a wrap of the same place,
            or two records that share a place but do not share all of them.
    """
    holders: dict[str, list[Record]] = {}
    for record in records:
        if record.action == "context":
            continue
        for place in record.places:
            for earlier in holders.setdefault(place, []):
                reason = _clash(earlier, record)
                if reason:
                    raise Conflict(
                        f"{earlier.id} and {record.id} cannot both have {place}",
                        where=f"patches.{earlier.system} and patches.{record.system}",
                        why=reason,
                        todo="make one of them a wrap, or let one record do both jobs; for aliases, name the same ones",
                    )
            holders[place].append(record)


def _clash(earlier: Record, later: Record) -> str | None:
    if earlier.action == later.action == "replace":
        return "both replace it, so the second would silently drop the first"
    if later.action == "replace":
        return f"{later.id} replaces it after {earlier.id} wrapped it, so the wrap would be lost"
    if set(earlier.places) != set(later.places):
        return "they share a place but not all of them (target and aliases), so some places would hold one patch only"
    return None


def _exists(module: str) -> bool:
    """Whether a module can be found; modules of this package are looked up as files, so nothing is imported."""
    top, _, rest = module.partition(".")
    if top == __package__ and rest:
        path = Path(__file__).parent.joinpath(*rest.split("."))
        return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    return importlib.util.find_spec(top) is not None


def _wrong(record: Record, why: str, todo: str) -> LedgerError:
    return LedgerError(f"patch record {record.id} is wrong", where=f"patches.{record.system}", why=why, todo=todo)


def by_id(identifier: str) -> Record:
    """The record of that id.

    Raises:
        LedgerError: there is none; the message lists what there is.
    """
    for record in RECORDS:
        if record.id == identifier:
            return record
    raise LedgerError(
        f"there is no patch {identifier!r}",
        where="the ledger",
        why=f"it holds: {', '.join(r.id for r in RECORDS) or 'nothing'}",
        todo="python -m patches list",
    )


def of_systems(*systems: str) -> tuple[Record, ...]:
    """The records of these systems, in ledger order."""
    return tuple(record for record in RECORDS if record.system in systems)


RECORDS: tuple[Record, ...] = checked(
    (
        *cpu.RECORDS,
        *local.RECORDS,
        *entry.RECORDS,
        *data.RECORDS,
        *checkpoint.RECORDS,
        *log.RECORDS,
        *recompute.RECORDS,
        *seq1f1b.RECORDS,
        *usp.RECORDS,
        *paro.RECORDS,
    )
)
