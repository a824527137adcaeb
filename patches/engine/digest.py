"""What was applied, as one short string that ranks, logs and checkpoints can compare."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from patches.engine.apply import Applied
from patches.errors import PatchError
from patches.record import Record

LENGTH = 12


def hashes(sets: Iterable[Applied]) -> dict[str, str]:
    """Per applied record, in order: a short hash of its wiring, its upstream sources and its implementation's source.

    Paths do not go in, so machines with different installation folders agree.
    """
    return {record.id: of(record, applied.fingerprints) for applied in sets for record in applied.records}


def of(record: Record, fingerprints: Mapping[str, str]) -> str:
    """The hash of one record over given fingerprints of upstream's places."""
    wiring = [record.id, record.action, record.places, record.impl, record.when]
    sources = {place: fingerprints[place] for place in record.upstream_places}
    return _short([wiring, sources, _source_sha256(record)])


def combined(per_record: Mapping[str, str]) -> str:
    """The digest of a whole set; order matters, because wraps stack."""
    return _short(list(per_record.items()))


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """In words, what `ours` has, lacks or has differently, compared with `theirs`; empty when they are equal."""
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
    """The lines for the log: one per patch, then the digest of all."""
    lines = [f"patch {r.id}: {r.action} {r.target} [{per_record[r.id]}]" for r in records]
    return [*lines, f"patches: {len(per_record)} applied, digest {combined(per_record)}"]


def _source_sha256(record: Record) -> str:
    module = record.impl.partition(":")[0]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise PatchError(
            f"the implementation of {record.id} has no source file",
            where=record.impl,
            why="its source is part of the digest that ranks and checkpoints compare",
            todo="keep implementations in Python files",
        )
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _short(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:LENGTH]
