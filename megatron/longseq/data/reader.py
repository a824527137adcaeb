"""Read the documents of a piece; what is no document is an item with a reason, at a line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.longseq.data.shards import Piece, owned_lines


@dataclass(frozen=True)
class Item:
    """One document (`text`), or why there is none (`reason`); `line` counts from 0 at the piece's first line."""

    line: int
    text: str = ""
    reason: str = ""


def read_items(piece: Piece, json_key: str) -> Iterator[Item]:
    """Yield one item per text file, or one per jsonl line (blank lines are empty documents)."""
    with open(piece.path, "rb") as stream:
        if piece.kind == "text":
            yield _text_item(stream.read(piece.size))
            return
        for number, line in enumerate(owned_lines(stream, piece.start, piece.stop)):
            yield _json_item(number, line, json_key)


def _text_item(content: bytes) -> Item:
    try:
        return Item(0, text=content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Item(content.count(b"\n", 0, error.start), reason=_not_utf8(content, error))


def _json_item(number: int, line: bytes, key: str) -> Item:
    line = line.rstrip()  # the CR of CRLF would turn up in the parser's words
    if not line:
        return Item(number)
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Item(number, reason=_not_utf8(line, error))
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return Item(number, reason=f"not JSON: {detail}")
    reason = _no_text(record, key)
    return Item(number, reason=reason) if reason else Item(number, text=record[key])


def _no_text(record: object, key: str) -> str:
    if not isinstance(record, dict):
        return f"a JSON object is wanted, not {_json_type(record)}"
    if key not in record:
        return f"no key {key!r} (its keys: {', '.join(sorted(record)[:8]) or 'none'})"
    text = record[key]
    if not isinstance(text, str):
        return f"key {key!r} holds {_json_type(text)}, not a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"key {key!r} holds a lone surrogate at character {error.start}: no UTF-8"
    return ""


def _not_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    column = error.start - content.rfind(b"\n", 0, error.start)
    return f"invalid UTF-8: byte 0x{content[error.start]:02x} at byte {column} of the line"


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
