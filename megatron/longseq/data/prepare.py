"""Prepare an output: skip it if it is up to date, resume an interrupted run, and publish complete files only."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from megatron.longseq.data import MOST_SHOWN, DataError, manifest, write
from megatron.longseq.data.corpus import SourceFile, changed_files, check_is_text
from megatron.longseq.data.encode import EncodeOptions, ShardRecord, encode_all, read_finished, shard_dtype
from megatron.longseq.data.progress import Progress
from megatron.longseq.data.shards import Shard, default_shard_bytes, plan_shards
from megatron.longseq.data.tokenizer import TokenizerSpec

Say = Callable[[str], None]


@dataclass(frozen=True)
class PrepareRequest:
    """One output to prepare.

    Attributes:
        files: the input files in order.
        prefix: path of the output without suffix.
        tokenizer: the tokenizer.
        options: further options that change the output.
        workers: number of processes.
        overwrite: rebuild an output that was made from something else.
        shard_bytes: shard size in bytes; None chooses it by the size of the input.
    """

    files: Sequence[SourceFile]
    prefix: str
    tokenizer: TokenizerSpec
    options: EncodeOptions = field(default_factory=EncodeOptions)
    workers: int = 1
    overwrite: bool = False
    shard_bytes: int | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of unfinished work. It is on the output's file system, so that renaming is atomic."""
        path = Path(self.prefix)
        return path.with_name(f".{path.name}.unfinished")


def prepare(request: PrepareRequest, say: Say = print) -> bool:
    """Write `prefix.bin`, `prefix.idx` and `prefix.json`, for conversations also their loss mask.

    Args:
        request: inputs, options, tokenizer and prefix of the output.
        say: prints a line.

    Returns:
        False if the output exists already and was made from the same inputs, options and tokenizer.

    Raises:
        DataError: the output exists and was made from something else (without `overwrite`), documents are malformed,
            there are no documents, disk space is missing, inputs change during the run, or another run works on the
            same output. Nothing is written then.
    """
    identity = manifest.identity(request.files, request.options, request.tokenizer)
    folder = request.folder
    if _is_publishing(folder, identity):
        with _locked(folder):
            write.publish(folder, request.prefix)
            say(f"{request.prefix}: completed the output of an interrupted run")
            return True
    if _is_up_to_date(request, identity):
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{request.prefix}: nothing to do, it was made from the same inputs, options and tokenizer")
        return False
    if not request.options.skip_malformed:
        check_is_text(request.files)
    with _locked(folder):
        shards = plan_shards(request.files, request.shard_bytes or default_shard_bytes(request.files))
        done = _resume(folder, shards, identity.key, request, say)
        records = _encode(request, shards, done, say)
        _check_unchanged(request)
        _finish(request, identity, shards, records, say)
    return True


def _is_publishing(folder: Path, identity: manifest.Identity) -> bool:
    try:
        made = manifest.identity_from(json.loads((folder / "out.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError):
        return False
    return made.key == identity.key


def _is_up_to_date(request: PrepareRequest, identity: manifest.Identity) -> bool:
    present = [request.prefix + suffix for suffix in write.SUFFIXES if Path(request.prefix + suffix).exists()]
    if not present or (request.overwrite and not Path(f"{request.prefix}.json").exists()):
        return False
    if not Path(f"{request.prefix}.json").exists():
        raise DataError(f"{', '.join(present)} exists without a manifest; use --overwrite, or another --output")
    try:
        changes = manifest.differences(manifest.identity_from(manifest.read(request.prefix)), identity)
    except DataError:
        if request.overwrite:
            return False
        raise
    if changes and not request.overwrite:
        raise DataError(
            f"{request.prefix} exists and was made from something else; use --overwrite to rebuild it, or another "
            f"--output. Differences:\n  " + "\n  ".join(changes)
        )
    return not changes


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the work folder for this run. The system releases the lock when the process ends in any way."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"another run is using {folder}; wait for it, or choose another --output") from error
    finally:
        os.close(handle)


def _resume(
    folder: Path, shards: Sequence[Shard], key: str, request: PrepareRequest, say: Say
) -> dict[int, ShardRecord]:
    """Return the records of finished shards. Remove unfinished work of other inputs, options or shard sizes."""
    plan_file = folder / "plan.json"
    plan_key = json.dumps({"key": key, "shards": len(shards), "sizes": [shard.size for shard in shards]})
    if not plan_file.exists() or plan_file.read_text("utf-8") != plan_key:
        if plan_file.exists():
            say(f"{folder}: removing unfinished work of other inputs or options")
        _clear(folder)
        write.write_atomically(plan_file, plan_key)
        return {}
    found = {shard.index: read_finished(folder, shard.index, request.tokenizer) for shard in shards}
    done = {index: record for index, record in found.items() if record is not None}
    say(f"{request.prefix}: resuming, {len(done)} of {len(shards)} shards are finished")
    return done


def _encode(
    request: PrepareRequest, shards: Sequence[Shard], done: dict[int, ShardRecord], say: Say
) -> list[ShardRecord]:
    """Encode the unfinished shards and return the records of all shards in order.

    Raises:
        DataError: documents are malformed and not to be skipped, or disk space is missing.
    """
    todo = [shard for shard in shards if shard.index not in done]
    total, ready = sum(shard.size for shard in shards), sum(shards[index].size for index in done)
    itemsize = _bytes_per_token(request.tokenizer)
    # An upper estimate: one byte per token for the byte tokenizer, two for others, whose tokens have about three bytes.
    tokens = total if request.tokenizer.type == "byte" else total // 2
    _check_space(request.folder, 2 * tokens * itemsize - ready * itemsize)
    say(
        f"{request.prefix}: {len(request.files)} files, {total / 1e6:.1f} MB, "
        f"{len(todo)} shards to do, {request.workers} workers"
    )
    records, refused = dict(done), 0
    results = encode_all(todo, request.tokenizer, request.options, request.folder, request.workers)
    with Progress("tokens", total, ready) as progress:
        for shard, record in results:
            records[shard.index] = record
            progress.advance(shard.size, record.documents, record.tokens)
            refused += len(record.malformed)
            if refused >= MOST_SHOWN and not request.options.skip_malformed:
                results.close()
                break
    # After an early stop, shards are missing. Line numbers are known only up to the first missing one.
    ordered = [records[shard.index] for shard in takewhile(lambda shard: shard.index in records, shards)]
    if not request.options.skip_malformed:
        _refuse_malformed(request.folder, list(_describe_malformed(shards, ordered)))
    return ordered


def _describe_malformed(shards: Sequence[Shard], records: Sequence[ShardRecord]) -> Iterator[str]:
    """Yield `file:line: reason` for each malformed document. Lines are counted from 1 over all ranges of a file."""
    path, before = "", 0
    for shard, record in zip(shards, records, strict=False):
        for number, part in enumerate(shard.ranges):
            if part.path != path:
                path, before = part.path, 0
            for _, line, reason in (entry for entry in record.malformed if entry[0] == number):
                yield f"{path}:{before + line + 1}: {reason}"
            before += record.lines[number] if number < len(record.lines) else 0


def _refuse_malformed(folder: Path, named: Sequence[str]) -> None:
    if not named:
        return
    shutil.rmtree(folder)
    shown = "\n  ".join(named[:MOST_SHOWN])
    first = f"the first {MOST_SHOWN}" if len(named) >= MOST_SHOWN else str(len(named))
    raise DataError(
        f"malformed documents ({first} follow); repair them, or skip them with --skip-malformed. "
        f"Nothing was written.\n  {shown}"
    )


def _bytes_per_token(tokenizer: TokenizerSpec) -> int:
    """Return the bytes of a token in the files of a shard: its id, and of conversations its place in the loss mask."""
    return int(shard_dtype(tokenizer.vocab_size)().itemsize) + int(tokenizer.is_chat)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{folder.parent}: about {size / 1e9:.2f} GB are needed for shards and output, but {free / 1e9:.2f} GB "
            "are free; free some space, or choose an --output on another disk"
        )


def _check_unchanged(request: PrepareRequest) -> None:
    changed = changed_files(request.files)
    if changed:
        shutil.rmtree(request.folder)
        raise DataError(
            f"{len(changed)} inputs changed while they were read ({', '.join(changed[:5])}); nothing was written. "
            "Run the command again when the files are complete"
        )


def _finish(
    request: PrepareRequest,
    identity: manifest.Identity,
    shards: Sequence[Shard],
    records: Sequence[ShardRecord],
    say: Say,
) -> None:
    folder, vocab_size = request.folder, request.tokenizer.vocab_size
    documents, tokens = sum(r.documents for r in records), sum(r.tokens for r in records)
    named = list(_describe_malformed(shards, records))
    if not documents:
        shutil.rmtree(folder)
        empty = sum(r.empty for r in records)
        raise DataError(f"no documents in the inputs ({empty} empty, {len(named)} malformed); nothing was written")
    _check_space(folder, tokens * _bytes_per_token(request.tokenizer))
    say("merging with upstream's builder (importing it takes seconds)")
    write.indexed_dataset()
    with Progress("merging", documents, unit="documents") as progress:
        lengths, dtype = write.merge(
            folder,
            len(shards),
            vocab_size,
            request.options.shuffle_seed,
            lambda n, t: progress.advance(n, n, t),
            request.tokenizer.is_chat,
        )
    counts: dict[str, Any] = {
        "empty_documents": sum(record.empty for record in records),
        "malformed": {"count": len(named), "listed": named[: manifest.MOST_LISTED]},
    }
    if request.tokenizer.is_chat:
        counts["tokens_in_loss"] = sum(record.trained for record in records)
    content = manifest.build(identity, request.prefix, lengths, dtype, counts)
    write.write_atomically(folder / "out.json", json.dumps(content, indent=1) + "\n")
    write.publish(folder, request.prefix)
    if named:
        say(f"{len(named)} malformed documents skipped:\n  " + "\n  ".join(named[:MOST_SHOWN]))


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
