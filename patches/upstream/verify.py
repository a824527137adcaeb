"""Compare an upstream (installed, unpacked, wheel file, checkout) with the lock. Import neither torch nor upstream."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from patches.errors import Drift, PatchError, UnknownTarget
from patches.record import Record
from patches.upstream.lock import Lock
from patches.upstream.source import Finder, Upstream
from patches.upstream.wheel import NAME, Distribution


def problems(records: Sequence[Record], lock: Lock, distribution: Distribution, finder: Finder) -> list[PatchError]:
    """Return every difference between this upstream and the one that the patches are written for.

    Args:
        records: the ledger.
        lock: the expected upstream.
        distribution: the upstream to check.
        finder: where the sources of patched symbols are taken from; the import path for the installed wheel, so that
            a tree that hides it is what gets checked.
    """
    found: list[PatchError] = list(_release(lock, distribution))
    by_file, drifted = _symbols(records, lock, Upstream(finder), found)
    for path, state in distribution.altered():
        where = distribution.tree.where(path)
        inside = by_file.get(where, [])
        note = "it contains no patched symbol"
        if inside:
            note = "patched symbols in it: " + ", ".join(
                f"{place} ({'drifted, see above' if place in drifted else 'unchanged'})" for place in inside
            )
        found.append(
            Drift(
                f"{path} is {state}",
                where=where,
                why=f"its sha256 is not the one in the wheel's RECORD; {note}",
                todo=f"reinstall: pip install --force-reinstall --no-deps {NAME}=={lock.version}",
            )
        )
    return found


def _release(lock: Lock, distribution: Distribution) -> Iterator[PatchError]:
    if distribution.files is None:
        return
    if distribution.version != lock.version:
        yield Drift(
            f"{NAME} has version {distribution.version}, but the lock has {lock.version}",
            where=distribution.tree.label,
            why="the patches are written for one release",
            todo=f"pip install {NAME}=={lock.version}, or change the version: python -m patches bump WHEEL",
        )
    elif distribution.record_sha256 != lock.record_sha256:
        yield Drift(
            f"the RECORD of {NAME} {distribution.version} is not the one in the lock",
            where=distribution.tree.label,
            why=f"its upstream part hashes to {str(distribution.record_sha256)[:12]}, not {lock.record_sha256[:12]}: "
            "another build of this release (another Python or platform), or a changed one",
            todo=f"install the published wheel of {NAME}=={lock.version}, or check the build and update the lock: "
            "python -m patches bump --write",
        )


def _symbols(
    records: Sequence[Record], lock: Lock, upstream: Upstream, found: list[PatchError]
) -> tuple[dict[str, list[str]], set[str]]:
    """Check every patched place. Return the places by file, and the differences."""
    by_file: dict[str, list[str]] = {}
    drifted = set()
    places = {place: record for record in records for place in record.upstream_places}
    for place, record in places.items():
        try:
            symbol = upstream.symbol(place)
            by_file.setdefault(symbol.path, []).append(place)
            lock.check(symbol)
        except (Drift, UnknownTarget) as error:
            drifted.add(place)
            found.append(error.about(record.id))
    for place in sorted(set(lock.symbols) - set(places)):
        found.append(
            Drift(
                f"the lock has {place}, but no patch uses it",
                where="patches/upstream.lock",
                why="a record was removed or its target renamed, and the lock was not updated",
                todo="python -m patches bump --write",
            )
        )
    return by_file, drifted


def elsewhere(records: Sequence[Record], distribution: Distribution, upstream: Upstream) -> list[str]:
    """Return the patched modules that would be imported from outside the installed wheel, as `module: file`.

    Args:
        records: all records.
        distribution: the installed wheel.
        upstream: the symbols that an import would find.
    """
    if not isinstance(distribution.tree.root, Path):
        return []
    modules = sorted({place.partition(":")[0] for record in records for place in record.upstream_places})
    sources = [source for source in map(upstream.finder.find, modules) if source is not None]
    root = distribution.tree.root.resolve()
    return [f"{s.module}: {s.path}" for s in sources if not Path(s.path).resolve().is_relative_to(root)]
