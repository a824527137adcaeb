"""Find the input files, fix their order and format, and refuse files that are not text."""

import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from megatron.longseq.data import MOST_SHOWN, DataError

FileFormat = Literal["text", "jsonl", "conversations"]

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
# Folders in the standard library's folder that are left out: installed packages, and tests. Some distributions do not
# install the tests, and the corpus must be the same on every machine.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# First bytes of a file, the format they show, and a command that converts the file to text.
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "compressed by gzip", "gunzip -k"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "zstd -d"),
    (b"BZh", "compressed by bzip2", "bunzip2 -k"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unxz -k"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "lz4 -d"),
    (b"PK\x03\x04", "a zip archive", "unzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x"),
    (b"\xff\xfe\x00\x00", "encoded in UTF-32", "iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "encoded in UTF-32", "iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "encoded in UTF-16", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "encoded in UTF-16", "iconv -f UTF-16 -t UTF-8"),
    (b"PAR1", "a Parquet table", ""),
    (b"ARROW1", "an Arrow table", ""),
    (b"%PDF-", "a PDF", ""),
    (b"\x7fELF", "a program", ""),
)
HEAD = 1024  # bytes at the start of a file that are examined


@dataclass(frozen=True)
class SourceFile:
    """One input file, with its size and modification time when it was found.

    Attributes:
        path: absolute path.
        size: in bytes.
        mtime_ns: modification time in nanoseconds.
        kind: whether the file is one document (text), or holds one document (jsonl) or the messages of one or several
            conversations per line.
    """

    path: str
    size: int
    mtime_ns: int
    kind: FileFormat

    @property
    def stamp(self) -> str:
        """Return format, size and time as one word. A file whose stamp is equal is taken to be unchanged."""
        return f"{self.kind}:{self.size}:{self.mtime_ns}"


def find_files(inputs: Sequence[str], globs: Sequence[str] = (), kind: FileFormat | None = None) -> list[SourceFile]:
    """List the input files in a fixed order: inputs as given, and the files of a folder sorted by relative path.

    Folders are searched recursively. Names that begin with a dot are left out.

    Args:
        inputs: files and folders.
        globs: patterns that select files inside folders. A pattern with a slash is matched against the path inside the
            folder, any other against the file name.
        kind: format of all files. None selects it by suffix.

    Raises:
        DataError: an input is missing, is neither a file nor a folder, contains no files, or a file is found twice.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name).absolute()
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            found.extend(_files_in_folder(path, globs))
        elif path.exists():
            raise DataError(
                f"input {name}: a pipe or a device, neither a file nor a folder; write its data to a file and give that"
            )
        else:
            raise DataError(f"input {name}: no such file or folder; check the path")
    return _source_files(found, kind)


def stdlib_files() -> list[SourceFile]:
    """List the sources of the running interpreter's standard library, without tests and installed packages.

    Raises:
        DataError: the interpreter was installed without source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    try:
        return _source_files(_files_in_folder(root, ["*.py"], NOT_STDLIB), "text")
    except DataError as error:
        raise DataError(f"the standard library of this interpreter has no sources: {error}") from error


def changed_files(files: Iterable[SourceFile]) -> list[str]:
    """Return the paths of files whose size or modification time has changed since they were found."""
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


def _files_in_folder(root: Path, globs: Sequence[str], without: frozenset[str] = frozenset()) -> list[Path]:
    relative: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        inside = Path(folder).relative_to(root)
        relative += [(inside / name).as_posix() for name in names if not name.startswith(".")]
    chosen = sorted(path for path in relative if _matches(path, globs))
    if not chosen:
        selection = f" that match {', '.join(globs)}" if globs else ""
        raise DataError(
            f"input {root}: the folder holds no files{selection} (names that begin with a dot are left out)"
        )
    return [root / path for path in chosen]


def _matches(relative: str, globs: Sequence[str]) -> bool:
    name = relative.rsplit("/", 1)[-1]
    return not globs or any(fnmatchcase(relative if "/" in glob else name, glob) for glob in globs)


def _source_files(paths: Sequence[Path], kind: FileFormat | None) -> list[SourceFile]:
    files: list[SourceFile] = []
    seen: set[str] = set()
    for path in paths:
        name = str(path)
        if name in seen:
            raise DataError(f"input {name} is given twice, so its documents would be repeated: give it once")
        seen.add(name)
        stat = path.stat()
        by_suffix: FileFormat = "jsonl" if path.suffix.lower() in JSONL_SUFFIXES else "text"
        files.append(SourceFile(name, stat.st_size, stat.st_mtime_ns, kind or by_suffix))
    return files


def check_is_text(files: Sequence[SourceFile]) -> None:
    """Refuse input files that are compressed, binary, or in another encoding than UTF-8.

    Raises:
        DataError: lists the first such files with their format and a command that converts them.
    """
    lines = []
    for file in files:
        try:
            with open(file.path, "rb") as stream:
                found = detect_format(stream.read(HEAD))
        except OSError as error:
            raise DataError(f"input {file.path}: {error.strerror}; make it readable, or leave it out") from error
        if found is not None:
            what, command = found
            lines.append(f"{file.path}: {what}" + (f" (convert it with {command})" if command else ""))
            if len(lines) == MOST_SHOWN:
                break
    if lines:
        raise DataError(
            "inputs that are not UTF-8 text or jsonl. Convert them, select other files with --glob, or skip them with "
            "--skip-malformed. Nothing was written.\n  " + "\n  ".join(lines)
        )


def detect_format(head: bytes) -> tuple[str, str] | None:
    """Detect files that are not UTF-8 text by their first bytes.

    UTF-16 without a byte order mark and binary files are detected by zero bytes, which UTF-8 text does not contain.

    Args:
        head: first bytes of the file.

    Returns:
        The format and the command that converts it to text, which may be empty. None if the file may be text.
    """
    for signature, what, command in SIGNATURES:
        if head.startswith(signature) and not (signature == b"BZh" and not head[3:4].isdigit()):
            return what, command
    if len(head) >= 4 and head.count(0) >= len(head) // 3:
        for zeros, name in ((head[1::2], "UTF-16LE"), (head[0::2], "UTF-16BE")):
            if zeros.count(0) > 0.8 * len(zeros) and head.count(0) < 0.7 * len(head):
                return f"probably encoded in {name}", f"iconv -f {name} -t UTF-8"
    if b"\0" in head and not _is_utf8(head):
        return "binary", ""
    return None


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # the last character of the head may be incomplete
    return True
