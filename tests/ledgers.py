"""Parts of the ledger of patches."""

from collections.abc import Callable, Iterable

from patches import ledger
from patches.record import Callback, Record


def of_systems(*systems: str) -> tuple[Record, ...]:
    """What these systems apply, in ledger order: their records, and hooks with their callbacks alone."""
    return _with_parts(lambda part: part.system in systems, ledger.RECORDS)


def without(records: Iterable[Record], identifier: str) -> tuple[Record, ...]:
    """The records without the one of that id, or without the callback of that id."""
    kept = (record for record in records if record.id != identifier)
    return _with_parts(lambda part: part.id != identifier, kept)


def _with_parts(keep: Callable[[Record | Callback], bool], records: Iterable[Record]) -> tuple[Record, ...]:
    found = (record.only(tuple(part for part in record.parts if keep(part))) for record in records)
    return tuple(record for record in found if record is not None)
