"""One shard's work: read its documents, write their tokens and a record, each under its name only when whole."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.data import DataError
from megatron.longseq.data.reader import read_items
from megatron.longseq.data.shards import Shard
from megatron.longseq.data.tokenizer import Ids, Tokenizer, TokenizerSpec, load

# Refusals shown before giving up.
MOST_SHOWN = 20
# Upstream's index holds a document's length as a signed 32-bit number.
LONGEST = 2**31 - 1


@dataclass(frozen=True)
class Options:
    """What changes the output beside inputs and tokenizer."""

    json_key: str = "text"
    append_eod: bool = True
    skip_malformed: bool = False
    shuffle_seed: int | None = None


@dataclass
class ShardRecord:
    """What one shard gave: counts, lines of each piece, malformed as `(piece, line in it from 0, reason)`."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    lines: list[int] = field(default_factory=list)
    malformed: list[tuple[int, int, str]] = field(default_factory=list)


def shard_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the type of a shard's token file (our own intermediate; upstream chooses the output's type)."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def token_path(folder: Path, index: int) -> Path:
    """Return the path of a shard's tokens: raw ids, document after document."""
    return folder / f"{index:08d}.tokens"


def record_path(folder: Path, index: int) -> Path:
    """Return the path of a shard's record: document lengths (eod counted) and a `ShardRecord`; there = shard done."""
    return folder / f"{index:08d}.npz"


def encode_shard(shard: Shard, spec: TokenizerSpec, options: Options, folder: Path) -> tuple[Shard, ShardRecord]:
    """Write the shard's token file and record into `folder` and return the shard with its record.

    Raises:
        DataError: an input cannot be read.
    """
    tokenizer, record = load(spec), ShardRecord()
    lengths: list[int] = []
    unfinished = folder / f"{shard.index:08d}.{os.getpid()}.unfinished"
    try:
        with open(unfinished, "wb") as stream:
            for number, piece in enumerate(shard.pieces):
                lines = 0
                for item in read_items(piece, options.json_key):
                    lines = item.line + 1
                    ids = _document(item.text, tokenizer, spec, options) if item.text else None
                    reason = item.reason or _too_long(ids)
                    if reason:
                        record.malformed.append((number, item.line, reason))
                        if not options.skip_malformed and len(record.malformed) >= MOST_SHOWN:
                            return shard, record
                    elif ids is None or not len(ids):
                        record.empty += 1
                    else:
                        stream.write(ids.data)
                        lengths.append(len(ids))
                record.lines.append(lines)
        record.documents, record.tokens = len(lengths), sum(lengths)
        os.replace(unfinished, token_path(folder, shard.index))
        with open(unfinished, "wb") as stream:
            np.savez(stream, lengths=np.array(lengths, dtype=np.int64), record=np.array(json.dumps(asdict(record))))
        os.replace(unfinished, record_path(folder, shard.index))
    except OSError as error:
        raise DataError(f"shard {shard.index} ({error.filename or folder}): {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return shard, record


def read_record(folder: Path, index: int) -> tuple[NDArray[np.int64], ShardRecord]:
    """Return a finished shard's document lengths and its record."""
    with np.load(record_path(folder, index)) as file:
        fields = json.loads(str(file["record"]))
        fields["malformed"] = [(piece, line, reason) for piece, line, reason in fields["malformed"]]
        return file["lengths"], ShardRecord(**fields)


def finished(folder: Path, index: int, itemsize: int) -> ShardRecord | None:
    """Return the record of a shard that an earlier run finished, None if its files are missing or cut short."""
    try:
        _, record = read_record(folder, index)
        whole = token_path(folder, index).stat().st_size == record.tokens * itemsize
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return record if whole else None


def _document(text: str, tokenizer: Tokenizer, spec: TokenizerSpec, options: Options) -> Ids:
    kind = shard_dtype(spec.vocab_size)
    ids: Ids = tokenizer.encode(text).astype(kind)
    # A tokenizer file may append its own end: never two in a row.
    if options.append_eod and len(ids) and ids[-1] != spec.eod_id:
        ids = np.concatenate([ids, np.array([spec.eod_id], dtype=kind)], dtype=kind)
    return ids


def _too_long(ids: Ids | None) -> str:
    if ids is None or len(ids) <= LONGEST:
        return ""
    return (
        f"the document has {len(ids):,} tokens; upstream's index holds at most {LONGEST:,} for one document: split it"
    )
