"""Prepare an output: skip it if it is there, go on where a killed run stopped, refuse bad lines, publish it whole."""

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

from megatron.longseq.data import DataError, manifest, write
from megatron.longseq.data.corpus import SourceFile, changed_files
from megatron.longseq.data.encode import MOST_SHOWN, Options, ShardRecord, finished, shard_dtype
from megatron.longseq.data.packed import refuse_packed
from megatron.longseq.data.pool import encode_all
from megatron.longseq.data.progress import Progress
from megatron.longseq.data.shards import Shard, default_shard_bytes, plan
from megatron.longseq.data.tokenizer import TokenizerSpec

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """One output to prepare: `prefix` without suffix, `shard_bytes=None` for a size chosen from the input."""

    files: Sequence[SourceFile]
    prefix: str
    tokenizer: TokenizerSpec
    options: Options = field(default_factory=Options)
    workers: int = 1
    overwrite: bool = False
    shard_bytes: int | None = None

    @property
    def folder(self) -> Path:
        """Where unfinished work lies: in the output's folder, so that renaming is atomic."""
        path = Path(self.prefix)
        return path.with_name(f".{path.name}.unfinished")


def prepare(request: Request, say: Say = print) -> bool:
    """Make `prefix.bin`, `.idx` and `.json`; return False if they were there already, made from the same.

    Raises:
        DataError: the output exists and is another one (without `overwrite`), malformed documents, no documents,
            no disk space, inputs that change meanwhile, or a second run at the same time. Nothing is made then.
    """
    wanted = manifest.identity(request.files, request.options, request.tokenizer)
    folder = request.folder
    if _publishing(folder, wanted):
        with _locked(folder):
            write.publish(folder, request.prefix)
            say(f"{request.prefix}: finished what a killed run had all but published")
            return True
    if _there_already(request, wanted):
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{request.prefix}: nothing to do, made from the same inputs, options and tokenizer")
        return False
    if not request.options.skip_malformed:
        refuse_packed(request.files)
    with _locked(folder):
        shards = plan(request.files, request.shard_bytes or default_shard_bytes(request.files))
        done = _resume(folder, shards, wanted.key, request, say)
        records = _encode(request, shards, done, say)
        _check_unchanged(request)
        _finish(request, wanted, shards, records, say)
    return True


def _publishing(folder: Path, wanted: manifest.Identity) -> bool:
    try:
        made = manifest.identity_of(json.loads((folder / "out.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError):
        return False
    return made.key == wanted.key


def _there_already(request: Request, wanted: manifest.Identity) -> bool:
    present = [request.prefix + suffix for suffix in write.SUFFIXES if Path(request.prefix + suffix).exists()]
    if not present or (request.overwrite and not Path(f"{request.prefix}.json").exists()):
        return False
    if not Path(f"{request.prefix}.json").exists():
        raise DataError(
            f"{', '.join(present)} exists and no manifest says what it is; use --overwrite or another --output"
        )
    try:
        changes = manifest.differences(manifest.identity_of(manifest.read(request.prefix)), wanted)
    except DataError:
        if request.overwrite:
            return False
        raise
    if changes and not request.overwrite:
        raise DataError(
            f"{request.prefix} exists and was made from something else; use --overwrite to rebuild it, or another "
            f"--output. What changed:\n  " + "\n  ".join(changes)
        )
    return not changes


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the work folder for one run; the system lets go of it when the process ends, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"another run is working in {folder}; wait for it, or choose another --output") from error
    finally:
        os.close(handle)


def _resume(folder: Path, shards: Sequence[Shard], key: str, request: Request, say: Say) -> dict[int, ShardRecord]:
    """Return the records of the shards that are done; work of another plan is thrown away."""
    plan_file = folder / "plan.json"
    plan_key = json.dumps({"key": key, "shards": len(shards), "sizes": [shard.size for shard in shards]})
    if not plan_file.exists() or plan_file.read_text("utf-8") != plan_key:
        if plan_file.exists():
            say(f"{folder}: unfinished work of other inputs or options, starting over")
        _empty(folder)
        write.write_whole(plan_file, plan_key)
        return {}
    itemsize = shard_dtype(request.tokenizer.vocab_size)().itemsize
    found = {shard.index: finished(folder, shard.index, itemsize) for shard in shards}
    done = {index: record for index, record in found.items() if record is not None}
    say(f"{request.prefix}: going on, {len(done)} of {len(shards)} shards are done")
    return done


def _encode(request: Request, shards: Sequence[Shard], done: dict[int, ShardRecord], say: Say) -> list[ShardRecord]:
    """Encode what is not done and return all records in order; raise at malformed documents unless they are skipped."""
    todo = [shard for shard in shards if shard.index not in done]
    total, ready = sum(shard.size for shard in shards), sum(shards[index].size for index in done)
    itemsize = shard_dtype(request.tokenizer.vocab_size)().itemsize
    # A token is at least a byte for bytes, and about three for a trained vocabulary; half of that is kept in hand.
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
    # After an early stop there are gaps: what lies behind the first one has no line numbers yet.
    ordered = [records[shard.index] for shard in takewhile(lambda shard: shard.index in records, shards)]
    if not request.options.skip_malformed:
        _refuse_malformed(request.folder, list(_named(shards, ordered)))
    return ordered


def _named(shards: Sequence[Shard], records: Sequence[ShardRecord]) -> Iterator[str]:
    """Say each malformed document as `file:line: reason`, lines counted from 1 through all pieces of a file."""
    path, before = "", 0
    for shard, record in zip(shards, records, strict=False):
        for number, piece in enumerate(shard.pieces):
            if piece.path != path:
                path, before = piece.path, 0
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
        f"malformed documents ({first} follow); repair them, or leave them out with --skip-malformed. "
        f"Nothing was made.\n  {shown}"
    )


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise DataError(
            f"{folder.parent}: about {wanted / 1e9:.2f} GB are needed (shards and output), {free / 1e9:.2f} GB are "
            "free; make room, or choose an --output elsewhere"
        )


def _check_unchanged(request: Request) -> None:
    changed = changed_files(request.files)
    if changed:
        shutil.rmtree(request.folder)
        raise DataError(
            f"{len(changed)} inputs changed while they were read ({', '.join(changed[:5])}); nothing was made: "
            "run again when they are complete"
        )


def _finish(
    request: Request, wanted: manifest.Identity, shards: Sequence[Shard], records: Sequence[ShardRecord], say: Say
) -> None:
    folder, vocab_size = request.folder, request.tokenizer.vocab_size
    documents, tokens = sum(r.documents for r in records), sum(r.tokens for r in records)
    named = list(_named(shards, records))
    if not documents:
        shutil.rmtree(folder)
        empty = sum(r.empty for r in records)
        raise DataError(f"no documents in the inputs ({empty} empty, {len(named)} malformed); nothing was made")
    _check_space(folder, tokens * shard_dtype(vocab_size)().itemsize)
    say("merging with upstream's builder (its import takes seconds)")
    write.indexed_dataset()
    with Progress("merging", documents, unit="documents") as progress:
        lengths, dtype = write.merge(
            folder, len(shards), vocab_size, request.options.shuffle_seed, lambda n, t: progress.advance(n, n, t)
        )
    counts: dict[str, Any] = {
        "empty_documents": sum(record.empty for record in records),
        "malformed": {"count": len(named), "listed": named[: manifest.MOST_LISTED]},
    }
    content = manifest.compose(wanted, request.prefix, lengths, dtype, counts)
    write.write_whole(folder / "out.json", json.dumps(content, indent=1) + "\n")
    write.publish(folder, request.prefix)
    if named:
        say(f"{len(named)} malformed documents left out:\n  " + "\n  ".join(named[:MOST_SHOWN]))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
