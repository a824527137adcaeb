"""Split the input files into shards of about equal size, and read the documents of a shard.

Large jsonl files are split into byte ranges. A range owns the lines that begin in it, so planning reads no files.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron.longseq.data.corpus import FileFormat, SourceFile

# Opening a file costs about as much as reading this many bytes, so small files count as more than their size.
FILE_COST = 4096
# Bounds of the default shard size in bytes, and the number of shards to aim for.
SMALLEST, LARGEST, SHARDS = 1 << 20, 256 << 20, 1024


Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class FileRange:
    """Bytes `[start, stop)` of a file: a whole text file, or the lines of a jsonl file that begin in the range.

    Attributes:
        path: path of the file.
        kind: its format.
        start, stop: offsets in bytes.
    """

    path: str
    kind: FileFormat
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Return the number of bytes in the range."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One unit of work, which is also the unit of resumption. Documents keep the order of the ranges.

    Attributes:
        index: number of the shard, from 0.
        ranges: input files, or parts of them, in order.
    """

    index: int
    ranges: tuple[FileRange, ...]

    @property
    def size(self) -> int:
        """Return the number of input bytes."""
        return sum(part.size for part in self.ranges)


@dataclass(frozen=True)
class InputDocument:
    """One document or the conversations of one line, or the reason why the input at this place is malformed.

    Attributes:
        line: line number, counted from 0 at the start of the file range.
        text: the document; empty for an empty or a malformed one.
        reason: why the document is malformed; empty if it is not.
        conversations: the conversations of the line, each of which begins with its system message if it has one.
    """

    line: int
    text: str = ""
    reason: str = ""
    conversations: tuple[Conversation, ...] = ()


def default_shard_bytes(files: Iterable[SourceFile]) -> int:
    """Choose a shard size in bytes. It depends on the input only, so that any number of workers can resume a run."""
    total = sum(file.size for file in files)
    return min(max(total // SHARDS, SMALLEST), LARGEST)


def plan_shards(files: Sequence[SourceFile], shard_bytes: int) -> list[Shard]:
    """Pack the files in order into shards of at least `shard_bytes`. The last shard may be smaller.

    Args:
        files: input files.
        shard_bytes: least number of bytes of a shard.

    Raises:
        ValueError: `shard_bytes` is not positive.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard size {shard_bytes}: a shard needs at least one byte")
    shards: list[Shard] = []
    ranges: list[FileRange] = []
    cost = 0
    for file in files:
        for part in _split_file(file, shard_bytes):
            ranges.append(part)
            cost += part.size + FILE_COST
            if cost >= shard_bytes:
                shards.append(Shard(len(shards), tuple(ranges)))
                ranges, cost = [], 0
    if ranges:
        shards.append(Shard(len(shards), tuple(ranges)))
    return shards


def _split_file(file: SourceFile, shard_bytes: int) -> Iterator[FileRange]:
    step = max(file.size, 1) if file.kind == "text" else shard_bytes
    for start in range(0, max(file.size, 1), step):
        yield FileRange(file.path, file.kind, start, min(start + step, file.size))


def owned_lines(stream: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Yield the lines that begin in bytes `[start, stop)`.

    Ranges that cover a file yield each of its lines exactly once. Lines end at LF only, and a final LF does not begin
    another line.

    Args:
        stream: a seekable stream.
        start: first byte of the range.
        stop: byte after the range.

    Yields:
        Each line without its LF.
    """
    position = start
    if start > 0:
        # The line that contains byte start - 1 belongs to an earlier range, unless that byte is its LF.
        stream.seek(start - 1)
        position = start - 1 + len(stream.readline(stop - start + 1))
    else:
        stream.seek(0)
    while position < stop:
        line = stream.readline()
        if not line:
            return
        position += len(line)
        yield line.removesuffix(b"\n")


def read_documents(part: FileRange, json_key: str) -> Iterator[InputDocument]:
    """Yield one document per text file, or one per jsonl line. Blank lines are empty documents.

    Args:
        part: the file range to read.
        json_key: key of the text, or of the messages of conversations, in a jsonl line.
    """
    with open(part.path, "rb") as stream:
        if part.kind == "text":
            yield _from_text(stream.read(part.size))
            return
        for number, line in enumerate(owned_lines(stream, part.start, part.stop)):
            yield _from_json(number, line, json_key, part.kind)


def _from_text(content: bytes) -> InputDocument:
    try:
        return InputDocument(0, text=content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return InputDocument(content.count(b"\n", 0, error.start), reason=_not_utf8(content, error))


def _from_json(number: int, line: bytes, key: str, kind: FileFormat) -> InputDocument:
    line = line.rstrip()  # removes the CR of CRLF, which would appear in the parser's messages
    if not line:
        return InputDocument(number)
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return InputDocument(number, reason=_not_utf8(line, error))
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return InputDocument(number, reason=f"not JSON: {detail}")
    if kind == "conversations":
        reason = _why_no_key(record, key) or _why_no_messages(record[key], key)
        return InputDocument(number, reason=reason, conversations=() if reason else split_conversations(record[key]))
    reason = _why_no_key(record, key) or _why_no_text(record[key], f"key {key!r}")
    return InputDocument(number, reason=reason) if reason else InputDocument(number, text=record[key])


def split_conversations(messages: Conversation) -> tuple[Conversation, ...]:
    """Split the messages of a line before each system message, as upstream's SFT data set does."""
    conversations: list[Conversation] = []
    for message in messages:
        if message["role"] == "system" or not conversations:
            conversations.append([])
        conversations[-1].append(message)
    return tuple(conversations)


def _why_no_key(record: object, key: str) -> str:
    if not isinstance(record, dict):
        return f"expected a JSON object, found {_json_type(record)}"
    if key not in record:
        return f"no key {key!r} (its keys: {', '.join(sorted(record)[:8]) or 'none'})"
    return ""


def _why_no_messages(messages: object, key: str) -> str:
    if not isinstance(messages, list):
        return f"key {key!r} holds {_json_type(messages)}, not a list of messages"
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"message {number}: expected a JSON object, found {_json_type(message)}"
        for field in ("role", "content"):
            reason = _why_no_key(message, field) or _why_no_text(message[field], f"key {field!r}")
            if reason:
                return f"message {number}: {reason}"
    return ""


def _why_no_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        return f"{where} holds {_json_type(text)}, not a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{where} holds a lone surrogate at character {error.start}, which UTF-8 cannot represent"
    return ""


def _not_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    column = error.start - content.rfind(b"\n", 0, error.start)
    return f"invalid UTF-8: byte 0x{content[error.start]:02x} at byte {column} of the line"


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
