"""The only module that touches upstream: its builder writes the `.bin/.idx`, and finished files take their names."""

import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.data.encode import read_record, shard_dtype, token_path

# The order in which finished files take their final names: upstream opens a data set only when `.bin` and `.idx` are
# both there, and the manifest comes last because it vouches for them.
SUFFIXES = (".bin", ".idx", ".json")


def indexed_dataset() -> Any:
    """Import upstream's module of that name (it brings torch: seconds), without its advice on training packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


def merge(
    folder: Path, shards: int, vocab_size: int, shuffle_seed: int | None, advance: Callable[[int, int], None]
) -> tuple[NDArray[np.int64], str]:
    """Write `folder/out.bin` and `folder/out.idx` from the finished shards, calling `advance(documents, tokens)` often.

    Returns the document lengths in tokens, in the order written, and the name of the dtype that upstream chose.
    """
    upstream = indexed_dataset()
    dtype = upstream.DType.optimal_dtype(vocab_size)
    builder = upstream.IndexedDatasetBuilder(str(folder / "out.bin"), dtype=dtype)
    lengths = [read_record(folder, index)[0] for index in range(shards)]
    documents = _documents(folder, lengths, shard_dtype(vocab_size))
    order = _order(sum(map(len, lengths)), shuffle_seed)
    flat = np.concatenate(lengths)
    for done, number in enumerate(order, start=1):
        document = documents(int(number))
        builder.add_document(document, [len(document)])
        if done % 1024 == 0 or done == len(order):
            since = order[(done - 1) // 1024 * 1024 : done]
            advance(len(since), int(flat[since].sum()))
    builder.finalize(str(folder / "out.idx"))
    for suffix in (".bin", ".idx"):
        _to_disk(folder / f"out{suffix}")
    return flat[order], str(dtype.__name__)


def _order(count: int, seed: int | None) -> NDArray[np.int64]:
    # RandomState's stream is frozen across NumPy versions; default_rng's is not.
    return np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)


def _documents(
    folder: Path, lengths: Sequence[NDArray[np.int64]], dtype: type[np.uint16] | type[np.int32]
) -> Callable[[int], NDArray[Any]]:
    first = np.cumsum([0] + [len(part) for part in lengths])
    ends = [np.cumsum(part) for part in lengths]
    files = [
        np.memmap(token_path(folder, index), dtype=dtype, mode="r") if len(part) else np.empty(0, dtype)
        for index, part in enumerate(lengths)
    ]

    def document(number: int) -> NDArray[Any]:
        shard = int(np.searchsorted(first, number, side="right")) - 1
        inside = number - int(first[shard])
        stop = int(ends[shard][inside])
        return files[shard][stop - int(lengths[shard][inside]) : stop]

    return document


def write_whole(path: Path, content: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(content, "utf-8")
    _to_disk(unfinished)
    os.replace(unfinished, path)


def publish(folder: Path, prefix: str) -> None:
    """Move `folder/out.*` to `prefix.*` and remove the folder; killed anywhere, a second call ends what is begun.

    An older output goes first, so that no moment shows an index beside another index's data; with it go the sample
    indices that upstream cached for it under `prefix/cache`, whose names do not depend on the data's content.
    """
    if (folder / "out.bin").exists():
        for suffix in reversed(SUFFIXES):
            Path(prefix + suffix).unlink(missing_ok=True)
        for cached in Path(prefix, "cache").glob("*_indices"):
            shutil.rmtree(cached)
    for suffix in SUFFIXES:
        if (folder / f"out{suffix}").exists():
            os.replace(folder / f"out{suffix}", prefix + suffix)
    _to_disk(folder.parent)
    shutil.rmtree(folder)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
