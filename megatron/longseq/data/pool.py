"""Run the shards in this process or in a pool of processes; results come in the order of the shards either way."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megatron.longseq.data import DataError
from megatron.longseq.data.encode import Options, ShardRecord, encode_shard
from megatron.longseq.data.shards import Shard
from megatron.longseq.data.tokenizer import TokenizerSpec

# Shards handed out ahead of the one awaited, per worker: enough to keep all busy, few enough to stop soon.
AHEAD = 4


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    shards: Sequence[Shard], spec: TokenizerSpec, options: Options, folder: Path, workers: int
) -> Generator[tuple[Shard, ShardRecord]]:
    """Encode the shards with up to `workers` processes and yield each with its record, in the order given.

    Raises:
        DataError: an input cannot be read, or a worker process died.
    """
    workers = min(workers, len(shards))
    if workers <= 1:
        for shard in shards:
            yield encode_shard(shard, spec, options, folder)
        return
    # spawn: a fork of a process that holds torch's threads can hang; a worker imports NumPy only.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_worker_start)
    pending: list[Future[tuple[Shard, ShardRecord]]] = []
    try:
        for shard in shards:
            pending.append(pool.submit(encode_shard, shard, spec, options, folder))
            if len(pending) >= AHEAD * workers:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed from outside (out of memory?); finished shards are kept: run the same command "
            "again, with fewer --workers or smaller --shard-mb"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _worker_start() -> None:
    # Ctrl-C is the parent's business; it lets the shards under way finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave no worker behind when the parent is killed (it then cannot tell them to stop)."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
