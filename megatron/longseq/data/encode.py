"""Tokenize shards, in this process or in worker processes.

A shard produces a file of token ids, for conversations one of their loss mask, and a record. They are renamed into
place only when they are complete, the record last, so an interrupted run can resume from the finished shards.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.child_process import exit_with_parent
from megatron.longseq.data import MOST_SHOWN, DataError
from megatron.longseq.data.chat import load_chat
from megatron.longseq.data.shards import InputDocument, Shard, read_documents
from megatron.longseq.data.tokenizer import Ids, TokenizerSpec, load

Arrays = tuple[NDArray[Any], ...]  # what is written of a document: its ids, and of a conversation its loss mask
LONGEST = 2**31 - 1  # tokens per document: upstream's index stores the length as a signed 32-bit integer
# Shards submitted to the pool per worker: enough to keep all workers busy, few enough to stop soon after an error.
SUBMITTED_PER_WORKER = 4


@dataclass(frozen=True)
class EncodeOptions:
    """Options that change the output, apart from the inputs and the tokenizer.

    Attributes:
        json_key: key of the text, or of the messages of conversations, in a jsonl line.
        append_eod: append the end-of-document id to each document. Conversations end as their chat template says.
        skip_malformed: leave malformed documents out instead of refusing the input.
        shuffle_seed: seed for shuffling the documents; None keeps their order.
    """

    json_key: str = "text"
    append_eod: bool = True
    skip_malformed: bool = False
    shuffle_seed: int | None = None


@dataclass
class ShardRecord:
    """The result of one shard.

    Attributes:
        documents: number of documents or conversations written.
        tokens: number of tokens written.
        trained: of conversations, number of tokens that count in the loss.
        empty: number of empty documents, which are left out.
        lines: number of lines in each file range of the shard.
        malformed: `(index of the file range, line in it counted from 0, reason)` of each malformed document.
    """

    documents: int = 0
    tokens: int = 0
    trained: int = 0
    empty: int = 0
    lines: list[int] = field(default_factory=list)
    malformed: list[tuple[int, int, str]] = field(default_factory=list)


def shard_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the dtype of the ids in a shard's token file. Upstream chooses the dtype of the output."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def token_path(folder: Path, index: int) -> Path:
    """Return the path of a shard's token file, which holds the ids of all documents without separators."""
    return folder / f"{index:08d}.tokens"


def mask_path(folder: Path, index: int) -> Path:
    """Return the path of a shard's loss mask, which holds a byte for each token of its conversations."""
    return folder / f"{index:08d}.mask"


def record_path(folder: Path, index: int) -> Path:
    """Return the path of a shard's record: document lengths and a `ShardRecord`. A shard with a record is finished."""
    return folder / f"{index:08d}.npz"


def encode_shard(shard: Shard, spec: TokenizerSpec, options: EncodeOptions, folder: Path) -> tuple[Shard, ShardRecord]:
    """Tokenize the documents of a shard and write its token file, for conversations its mask file, and its record.

    Args:
        shard: the shard.
        spec: the tokenizer.
        options: how documents are read and written.
        folder: the folder for the files.

    Returns:
        The shard and its record.

    Raises:
        DataError: an input cannot be read, or a file cannot be written.
    """
    record, lengths = ShardRecord(), list[int]()
    names = [token_path(folder, shard.index), *([mask_path(folder, shard.index)] if spec.is_chat else [])]
    unfinished = [name.with_suffix(f"{name.suffix}.{os.getpid()}.unfinished") for name in names]
    record_file = record_path(folder, shard.index)
    unfinished.append(record_file.with_suffix(f".{os.getpid()}.unfinished"))
    try:
        with ExitStack() as stack:
            streams = [stack.enter_context(open(path, "wb")) for path in unfinished[:-1]]
            if not _encode_documents(shard, spec, options, record, lengths, streams):
                return shard, record
        for path, name in zip(unfinished, names, strict=False):
            os.replace(path, name)
        with open(unfinished[-1], "wb") as stream:
            np.savez(stream, lengths=np.array(lengths, dtype=np.int64), record=np.array(json.dumps(asdict(record))))
        os.replace(unfinished[-1], record_file)
    except OSError as error:
        raise DataError(f"shard {shard.index} ({error.filename or folder}): {error.strerror}") from error
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
    return shard, record


def _encode_documents(
    shard: Shard,
    spec: TokenizerSpec,
    options: EncodeOptions,
    record: ShardRecord,
    lengths: list[int],
    streams: Sequence[BinaryIO],
) -> bool:
    """Write the documents of a shard to the streams. Return False if too many are malformed to go on."""
    for number, part in enumerate(shard.ranges):
        lines = 0
        for document in read_documents(part, options.json_key):
            lines = document.line + 1
            try:
                encoded = _encode(document, spec, options)
            except DataError as error:
                record.malformed.append((number, document.line, str(error)))
                if not options.skip_malformed and len(record.malformed) >= MOST_SHOWN:
                    return False
                continue
            record.empty += not encoded
            for arrays in encoded:
                for stream, array in zip(streams, arrays, strict=True):
                    stream.write(array.data)
                lengths.append(len(arrays[0]))
                record.trained += int(arrays[1].sum()) if spec.is_chat else 0
        record.lines.append(lines)
    record.documents, record.tokens = len(lengths), sum(lengths)
    return True


def read_record(folder: Path, index: int) -> tuple[NDArray[np.int64], ShardRecord]:
    """Return the document lengths of a finished shard, in tokens, and its record.

    Args:
        folder: folder of the shards.
        index: number of the shard.

    Returns:
        int64 [documents], and the record.
    """
    with np.load(record_path(folder, index)) as file:
        fields = json.loads(str(file["record"]))
        fields["malformed"] = [(part, line, reason) for part, line, reason in fields["malformed"]]
        return file["lengths"], ShardRecord(**fields)


def read_finished(folder: Path, index: int, spec: TokenizerSpec) -> ShardRecord | None:
    """Return the record of a shard that an earlier run finished, or None if its files are missing or truncated.

    Args:
        folder: folder of the shards.
        index: number of the shard.
        spec: the tokenizer, which determines the bytes of an id.
    """
    itemsize = shard_dtype(spec.vocab_size)().itemsize
    try:
        _, record = read_record(folder, index)
        is_complete = token_path(folder, index).stat().st_size == record.tokens * itemsize
        is_complete &= not spec.is_chat or mask_path(folder, index).stat().st_size == record.tokens
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return record if is_complete else None


def _encode(document: InputDocument, spec: TokenizerSpec, options: EncodeOptions) -> list[Arrays]:
    """Return the ids of a document, or ids and loss mask of each conversation of a line; nothing for an empty one.

    Raises:
        DataError: the document is malformed, or too long; says why.
    """
    if document.reason:
        raise DataError(document.reason)
    dtype = shard_dtype(spec.vocab_size)
    encoded: list[Arrays] = []
    for conversation in document.conversations:
        ids, mask = load_chat(spec).encode(conversation)
        encoded.append((ids.astype(dtype), mask))
    if document.text:
        encoded.append((_encode_text(document.text, spec, options),))
    longest = max((len(arrays[0]) for arrays in encoded), default=0)
    if longest > LONGEST:
        raise DataError(
            f"the document has {longest:,} tokens; upstream's index holds at most {LONGEST:,} for one document: "
            "split it"
        )
    return [arrays for arrays in encoded if len(arrays[0])]


def _encode_text(text: str, spec: TokenizerSpec, options: EncodeOptions) -> Ids:
    dtype = shard_dtype(spec.vocab_size)
    ids: Ids = load(spec).encode(text).astype(dtype)
    # A tokenizer file may append the end-of-document id itself. It must not appear twice.
    if options.append_eod and len(ids) and ids[-1] != spec.eod_id:
        ids = np.concatenate([ids, np.array([spec.eod_id], dtype=dtype)], dtype=dtype)
    return ids


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    shards: Sequence[Shard], spec: TokenizerSpec, options: EncodeOptions, folder: Path, workers: int
) -> Generator[tuple[Shard, ShardRecord]]:
    """Tokenize the shards with up to `workers` processes.

    Args:
        shards: the shards.
        spec, options, folder: see `encode_shard`.
        workers: number of processes; with 1, or for one shard, this process tokenizes.

    Yields:
        Each shard with its record, in the order of `shards`.

    Raises:
        DataError: an input cannot be read, or a worker process died.
    """
    workers = min(workers, len(shards))
    if workers <= 1:
        for shard in shards:
            yield encode_shard(shard, spec, options, folder)
        return
    # The caller may have loaded torch, and forking a process that runs torch's threads can hang. Spawned workers import
    # only NumPy.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: list[Future[tuple[Shard, ShardRecord]]] = []
    try:
        for shard in shards:
            pending.append(pool.submit(encode_shard, shard, spec, options, folder))
            if len(pending) >= SUBMITTED_PER_WORKER * workers:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed from outside, perhaps because memory ran out. Finished shards are kept: run "
            "the same command again, with fewer --workers or a smaller --shard-mb"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # The parent handles Ctrl-C and lets running shards finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
