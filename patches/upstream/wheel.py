"""Read upstream and its RECORD from a folder (site-packages, unpacked wheel, checkout) or a wheel file."""

import base64
import csv
import hashlib
import importlib.metadata
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from patches.errors import PatchError
from patches.upstream.source import Source

NAME = "megatron-core"
COMPILED = ".so"  # the dataset helper: one build per Python version and machine
_DIST_INFO = re.compile(r"megatron_core-([^/]+)\.dist-info/RECORD")
_VERSION = re.compile(r"^(MAJOR|MINOR|PATCH) = (\d+)$", re.MULTILINE)


class Tree:
    """Files below a folder that holds `megatron/`, or in a `.whl` file, which is not unpacked. Also a `Finder`.

    Args:
        path: the folder or the wheel file. Files in it are named with forward slashes.

    Raises:
        PatchError: the file is not a wheel.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        try:
            self.root: Path | zipfile.Path = path if path.is_dir() else zipfile.Path(path)
        except zipfile.BadZipFile as error:
            raise _unusable(path, f"it is not a wheel file: {error}") from error

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a file, or None if there is none."""
        file = self.root / path
        return file.read_bytes() if file.is_file() else None

    def where(self, path: str) -> str:
        """Return the name of a file for messages."""
        return str(self.root / path)

    def records(self) -> list[str]:
        """Return the paths of all megatron-core RECORD files at the root."""
        paths = (f"{entry.name}/RECORD" for entry in self.root.iterdir())
        return sorted(path for path in paths if _DIST_INFO.fullmatch(path) and (self.root / path).is_file())

    def find(self, module: str) -> Source | None:
        """Return the module's source, or None."""
        stem = module.replace(".", "/")
        for path in (f"{stem}/__init__.py", f"{stem}.py"):
            data = self.read(path)
            if data is not None:
                return Source(module, self.where(path), data)
        return None


@dataclass(frozen=True)
class Distribution:
    """A tree and its RECORD.

    Attributes:
        tree: where the files are read from.
        version: version of upstream.
        files: sha256 (urlsafe base64) of each file under `megatron/`; None for a checkout, which has no RECORD.
    """

    tree: Tree
    version: str
    files: dict[str, str] | None

    @property
    def record_sha256(self) -> str | None:
        """Return the hash of upstream's own rows of RECORD, sorted. It is the same on every machine."""
        if self.files is None:
            return None
        sources = ((path, digest) for path, digest in sorted(self.files.items()) if not path.endswith(COMPILED))
        return hashlib.sha256("".join(f"{path},{digest}\n" for path, digest in sources).encode()).hexdigest()

    def altered(self) -> Iterator[tuple[str, str]]:
        """Return (path, `missing` or `changed`) of every file that differs from RECORD."""
        for path, expected in sorted((self.files or {}).items()):
            data = self.tree.read(path)
            if data is None:
                yield path, "missing"
            elif _record_hash(data) != expected:
                yield path, "changed"


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def open_distribution(path: Path) -> Distribution:
    """Read upstream from a wheel file or a folder.

    Raises:
        PatchError: there is no upstream there, or more than one.
    """
    if not path.exists():
        raise _unusable(path, "there is no such file or folder")
    tree = Tree(path)
    records = tree.records()
    if len(records) > 1:
        raise _unusable(path, f"it contains more than one megatron-core: {', '.join(records)}")
    if records:
        match = _DIST_INFO.fullmatch(records[0])
        assert match is not None
        return Distribution(tree, match[1], _upstream_rows((tree.read(records[0]) or b"").decode()))
    info = tree.read("megatron/core/package_info.py")
    if info is None:
        raise _unusable(path, "it contains neither a megatron_core-*.dist-info nor megatron/core")
    numbers = dict(_VERSION.findall(info.decode()))
    return Distribution(tree, ".".join(numbers.get(k, "?") for k in ("MAJOR", "MINOR", "PATCH")), None)


def installed() -> Distribution:
    """Return the megatron-core of this interpreter.

    Raises:
        PatchError: none is installed, or it came without a RECORD.
    """
    try:
        found = importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError as error:
        raise PatchError(
            f"{NAME} is not installed",
            where="this Python interpreter",
            why="upstream is a pinned wheel, not part of this repository",
            todo=f"install the version in patches/upstream.lock: pip install {NAME}==VERSION",
        ) from error
    root = Path(str(found.locate_file("")))
    record = found.read_text("RECORD")
    if record is None:
        raise _unusable(root, f"the installed {NAME} has no RECORD, so its files cannot be checked")
    return Distribution(Tree(root), found.version, _upstream_rows(record))


def _upstream_rows(record: str) -> dict[str, str]:
    rows = {}
    for row in csv.reader(record.splitlines()):
        if len(row) == 3 and row[0].startswith("megatron/") and "__pycache__" not in row[0]:
            rows[row[0]] = row[1].removeprefix("sha256=")
    return rows


def _unusable(path: Path, why: str) -> PatchError:
    return PatchError(
        "there is no upstream Megatron to read",
        where=str(path),
        why=why,
        todo="give a megatron_core wheel file, a folder that it is unpacked or installed in, or a Megatron-LM checkout",
    )
