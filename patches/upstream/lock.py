"""Read and write `upstream.lock`: the version and fingerprints of upstream that the patches are written for."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from patches.errors import Drift, PatchError
from patches.record import Record
from patches.upstream.source import Symbol, Upstream
from patches.upstream.wheel import NAME, Distribution

PATH = Path(__file__).parents[1] / "upstream.lock"


@dataclass(frozen=True)
class Lock:
    """The version and fingerprints of upstream that the patches are written for.

    Attributes:
        version: version of the wheel.
        record_sha256: hash of its RECORD, see `Distribution.record_sha256`.
        symbols: fingerprint of every patched place, by `module:Qual.name`.
    """

    version: str
    record_sha256: str
    symbols: dict[str, str] = field(default_factory=dict)

    def check(self, symbol: Symbol) -> None:
        """Compare one symbol of a tree with the lock.

        Raises:
            Drift: the symbol is not in the lock, or its source differs.
        """
        known = self.symbols.get(symbol.place)
        if known is None:
            raise Drift(
                f"{symbol.place} has no fingerprint in the lock",
                where=f"{symbol.path}:{symbol.line}",
                why="a patch is applied only to the upstream source that it was written for",
                todo="read the source, then update the lock: python -m patches bump --write",
            )
        if known != symbol.fingerprint:
            raise Drift(
                f"{symbol.place} is not the source that its patch was written for",
                where=f"{symbol.path}:{symbol.line}",
                why=f"its fingerprint is {symbol.fingerprint[:12]}, the lock says {known[:12]} ({NAME} {self.version})",
                todo=f"restore the wheel: pip install --force-reinstall --no-deps {NAME}=={self.version}; "
                "with a Megatron tree of your own: python -m patches run --megatron wheel SCRIPT ...; "
                "to move to this source: python -m patches bump WHEEL_OR_FOLDER",
            )


def fingerprints(records: Iterable[Record], upstream: Upstream) -> dict[str, str]:
    """Fingerprint every upstream place of the records.

    Raises:
        UnknownTarget: a place is gone.
    """
    places = sorted({place for record in records for place in record.upstream_places})
    return {place: upstream.symbol(place).fingerprint for place in places}


def make(records: Iterable[Record], distribution: Distribution) -> Lock:
    """Return the lock of these records for this wheel.

    Args:
        records: all records.
        distribution: the wheel, or a folder that it is installed or unpacked in.

    Raises:
        PatchError: the tree has no RECORD (it is a checkout).
        UnknownTarget: a place is gone.
    """
    if distribution.record_sha256 is None:
        raise PatchError(
            "the lock cannot be written from a checkout",
            where=distribution.tree.label,
            why="the lock identifies a released wheel by its RECORD, which a checkout does not have",
            todo="give the wheel file, or a folder that it is installed or unpacked in",
        )
    symbols = fingerprints(records, Upstream(distribution.tree))
    return Lock(distribution.version, distribution.record_sha256, symbols)


def read(path: Path | None = None) -> Lock:
    """Read a lock file, upstream.lock by default.

    Raises:
        PatchError: missing or malformed.
    """
    path = path or PATH
    try:
        data = json.loads(path.read_text())
        return Lock(data["version"], data["record_sha256"], dict(data["symbols"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(
            "the lock of upstream cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            todo="restore patches/upstream.lock from the repository",
        ) from error


def write(lock: Lock, path: Path | None = None) -> None:
    """Write a lock file atomically, sorted so that diffs are small.

    Args:
        lock: what to write.
        path: path of the file; None: upstream.lock of this package.
    """
    path = path or PATH
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(json.dumps({"wheel": NAME, **asdict(lock)}, indent=2, sort_keys=True) + "\n")
    scratch.replace(path)
