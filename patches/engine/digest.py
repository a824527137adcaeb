"""A short hash of the applied patches, which ranks, logs and checkpoints compare."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from patches.engine.apply import Applied
from patches.errors import PatchError
from patches.record import Callback, Record

LENGTH = 12


def hashes(sets: Iterable[Applied]) -> dict[str, str]:
    """Return a short hash of the fields, upstream sources and own source of each applied record and callback.

    Paths do not go in, so machines with different installation folders agree.
    """
    return {
        part.id: of(record, part, applied.fingerprints)
        for applied in sets
        for record in applied.records
        for part in record.parts
    }


def of(record: Record, part: Record | Callback, fingerprints: Mapping[str, str]) -> str:
    """Return the hash of a record, or of a callback of a hook, for given fingerprints of upstream's places.

    Args:
        record: the record.
        part: the record itself, or one of its callbacks.
        fingerprints: fingerprint of every upstream place of the record.
    """
    wiring = [part.id, record.action, record.places, part.impl, part.when]
    sources = {place: fingerprints[place] for place in record.upstream_places}
    return _short([wiring, sources, _source_sha256(part)])


def combined(per_record: Mapping[str, str]) -> str:
    """Return the digest of a set. It depends on the order, because wraps are nested."""
    return _short(list(per_record.items()))


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Describe which patches `ours` has, lacks or has changed, compared with `theirs`. Empty if they are equal.

    Args:
        ours, theirs: hashes of patches by id, in the order of application.
    """
    parts = [
        ("added", [i for i in ours if i not in theirs]),
        ("removed", [i for i in theirs if i not in ours]),
        ("changed", [i for i in ours if i in theirs and ours[i] != theirs[i]]),
    ]
    words = [f"{verb} {', '.join(ids)}" for verb, ids in parts if ids]
    if not words and list(ours) != list(theirs):
        words = ["the same patches in another order"]
    return "; ".join(words)


def report(records: Iterable[Record], per_record: Mapping[str, str]) -> list[str]:
    """Return the lines for the log: one per patch and callback of a hook, then the digest of all.

    Args:
        records: applied records.
        per_record: hashes of their parts by id.
    """
    records = list(records)
    lines = [f"patch {p.id}: {r.action} {r.target} [{per_record[p.id]}]" for r in records for p in r.parts]
    return [*lines, f"patches: {len(records)} applied, digest {combined(per_record)}"]


def _source_sha256(part: Record | Callback) -> str:
    module = part.impl.partition(":")[0]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise PatchError(
            f"the implementation of {part.id} has no source file",
            where=part.impl,
            why="its source is part of the digest that ranks and checkpoints compare",
            todo="put the implementation in a Python file",
        )
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _short(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:LENGTH]
