"""Files that are no text as they lie there: compressed, archives, another encoding, or another format."""

from collections.abc import Sequence

from megatron.longseq.data import DataError
from megatron.longseq.data.corpus import SourceFile

# What a file begins with, what it then is, and what makes text of it.
SIGNS: tuple[tuple[bytes, str, str], ...] = (
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
HEAD = 1024  # bytes of a file that are looked at
MOST_SHOWN = 20


def kind_of(head: bytes) -> tuple[str, str] | None:
    """Return what a file is that begins with these bytes, and the command that makes text of it; None: it may be text.

    Text in UTF-16 without its mark and binary files show themselves by zero bytes, which text in UTF-8 does not hold.
    """
    for sign, what, how in SIGNS:
        if head.startswith(sign) and not (sign == b"BZh" and not head[3:4].isdigit()):
            return what, how
    if len(head) >= 4 and head.count(0) >= len(head) // 3:
        for zeros, name in ((head[1::2], "UTF-16LE"), (head[0::2], "UTF-16BE")):
            if zeros.count(0) > 0.8 * len(zeros) and head.count(0) < 0.7 * len(head):
                return f"encoded in {name}, it seems", f"iconv -f {name} -t UTF-8"
    if b"\0" in head and not _is_utf8(head):
        return "binary", ""
    return None


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # a character that the head cuts off
    return True


def refuse_packed(files: Sequence[SourceFile]) -> None:
    """Refuse inputs of which no byte would be read as text.

    Raises:
        DataError: names the first files, what they are and what to do.
    """
    lines = []
    for file in files:
        try:
            with open(file.path, "rb") as stream:
                found = kind_of(stream.read(HEAD))
        except OSError as error:
            raise DataError(f"input {file.path}: {error.strerror}; make it readable, or leave it out") from error
        if found is not None:
            what, how = found
            lines.append(f"{file.path}: {what}" + (f" ({how} makes text of it)" if how else ""))
            if len(lines) == MOST_SHOWN:
                break
    if lines:
        raise DataError(
            "inputs that are not UTF-8 text or jsonl. Convert them first, choose others with --glob, or leave them out "
            "with --skip-malformed. Nothing was made.\n  " + "\n  ".join(lines)
        )
