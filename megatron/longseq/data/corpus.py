"""Find the documents' files: which ones, in which order, and whether they are text or jsonl."""

import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from megatron.longseq.data import DataError

Kind = Literal["text", "jsonl"]

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
# What lies in the standard library's folder and is not its sources: installed packages, and tests that some
# distributions leave out (with them the corpus would differ from machine to machine).
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class SourceFile:
    """One input file as it was when it was found; `size` in bytes, `mtime_ns` in nanoseconds."""

    path: str
    size: int
    mtime_ns: int
    kind: Kind

    @property
    def stamp(self) -> str:
        """Size, time and kind as one word: two equal stamps of a path mean that the file is taken as unchanged."""
        return f"{self.kind}:{self.size}:{self.mtime_ns}"


def find_files(inputs: Sequence[str], globs: Sequence[str] = (), kind: Kind | None = None) -> list[SourceFile]:
    """List the files of `inputs` in a fixed order: the inputs as given, the files of a folder by relative path.

    Folders are searched recursively without names that begin with a dot; `globs` filter what is found in them
    (a pattern with a slash is matched against the path inside the folder, else against the file name).
    `kind=None` decides by suffix.

    Raises:
        DataError: an input is missing, is no file or folder, yields nothing, or a file is reached twice.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name).absolute()
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            found.extend(_in_folder(path, globs))
        else:
            raise DataError(f"input {name}: no such file or folder; check the path")
    return _stamped(found, kind)


def stdlib_files() -> list[SourceFile]:
    """List the running interpreter's standard library sources (`*.py`, no tests, no installed packages), by path.

    Raises:
        DataError: this interpreter has no source files beside it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    try:
        return _stamped(_in_folder(root, ["*.py"], NOT_STDLIB), "text")
    except DataError as error:
        raise DataError(f"the standard library of this interpreter has no sources: {error}") from error


def changed_files(files: Iterable[SourceFile]) -> list[str]:
    """Return the paths whose size or time is no longer what it was when they were found."""
    changed = []
    for file in files:
        try:
            now = os.stat(file.path)
        except OSError:
            changed.append(file.path)
            continue
        if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
            changed.append(file.path)
    return changed


def _in_folder(root: Path, globs: Sequence[str], without: frozenset[str] = frozenset()) -> list[Path]:
    relative: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        inside = Path(folder).relative_to(root)
        relative += [(inside / name).as_posix() for name in names if not name.startswith(".")]
    chosen = sorted(path for path in relative if _matches(path, globs))
    if not chosen:
        wanted = f" that match {', '.join(globs)}" if globs else ""
        raise DataError(f"input {root}: the folder holds no files{wanted} (names that begin with a dot are left out)")
    return [root / path for path in chosen]


def _matches(relative: str, globs: Sequence[str]) -> bool:
    name = relative.rsplit("/", 1)[-1]
    return not globs or any(fnmatchcase(relative if "/" in glob else name, glob) for glob in globs)


def _stamped(paths: Sequence[Path], kind: Kind | None) -> list[SourceFile]:
    files: list[SourceFile] = []
    seen: set[str] = set()
    for path in paths:
        name = str(path)
        if name in seen:
            raise DataError(f"input {name} is reached twice; its documents would be doubled: name it once")
        seen.add(name)
        stat = path.stat()
        by_suffix: Kind = "jsonl" if path.suffix.lower() in JSONL_SUFFIXES else "text"
        files.append(SourceFile(name, stat.st_size, stat.st_mtime_ns, kind or by_suffix))
    return files
