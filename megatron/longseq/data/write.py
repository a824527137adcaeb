"""Write the output with upstream's builder, and move finished files into place.

Only this module and `chat.py` import upstream.
"""

import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.data import LOSS_MASK
from megatron.longseq.data.encode import mask_path, read_record, shard_dtype, token_path

# The order in which finished files are renamed. Upstream opens a data set only if `.bin` and `.idx` both exist. The
# manifest comes last, because its existence means that the others are complete.
SUFFIXES = (".bin", f"{LOSS_MASK}.bin", f"{LOSS_MASK}.idx", ".idx", ".json")


def indexed_dataset() -> Any:
    """Import upstream's `indexed_dataset`, and torch with it. Warnings about missing packages are suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


def merge(
    folder: Path,
    shards: int,
    vocab_size: int,
    shuffle_seed: int | None,
    advance: Callable[[int, int], None],
    has_loss_mask: bool = False,
) -> tuple[NDArray[np.int64], str]:
    """Write `folder/out.bin` and `folder/out.idx` from the finished shards.

    Args:
        folder: folder of the shards' files.
        shards: number of shards.
        vocab_size: number of ids, by which upstream chooses the dtype.
        shuffle_seed: seed for shuffling the documents; None keeps their order.
        advance: called regularly with the numbers of documents and tokens written since the last call.
        has_loss_mask: also write the loss mask of conversations, one byte per token, as another data set of the same
            documents.

    Returns:
        Tokens of each document in the order written, and the name of the dtype.
    """
    dtype = indexed_dataset().DType.optimal_dtype(vocab_size)
    lengths = [read_record(folder, index)[0] for index in range(shards)]
    order = _order(sum(map(len, lengths)), shuffle_seed)
    flat = np.concatenate(lengths)
    if has_loss_mask:
        masks = _document_reader(folder, lengths, np.uint8, mask_path)
        _build(folder / f"out{LOSS_MASK}", np.uint8, (masks(int(number)) for number in order))
    documents = _document_reader(folder, lengths, shard_dtype(vocab_size), token_path)

    def in_order() -> Iterator[NDArray[Any]]:
        for done, number in enumerate(order, start=1):
            yield documents(int(number))
            if done % 1024 == 0 or done == len(order):
                since = order[(done - 1) // 1024 * 1024 : done]
                advance(len(since), int(flat[since].sum()))

    _build(folder / "out", dtype, in_order())
    return flat[order], str(dtype.__name__)


def _build(prefix: Path, dtype: Any, documents: Iterable[NDArray[Any]]) -> None:
    """Write `prefix`.bin and `prefix`.idx, in which each document is one sequence, and flush them to disk."""
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    for suffix in (".bin", ".idx"):
        _fsync(Path(f"{prefix}{suffix}"))


def _order(count: int, seed: int | None) -> NDArray[np.int64]:
    # NumPy guarantees the same stream in all versions for RandomState, but not for default_rng.
    return np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)


def _document_reader(
    folder: Path,
    lengths: Sequence[NDArray[np.int64]],
    dtype: type[np.uint8] | type[np.uint16] | type[np.int32],
    path_of: Callable[[Path, int], Path],
) -> Callable[[int], NDArray[Any]]:
    first = np.cumsum([0] + [len(part) for part in lengths])
    ends = [np.cumsum(part) for part in lengths]
    files = [
        np.memmap(path_of(folder, index), dtype=dtype, mode="r") if len(part) else np.empty(0, dtype)
        for index, part in enumerate(lengths)
    ]

    def document(number: int) -> NDArray[Any]:
        shard = int(np.searchsorted(first, number, side="right")) - 1
        inside = number - int(first[shard])
        stop = int(ends[shard][inside])
        return files[shard][stop - int(lengths[shard][inside]) : stop]

    return document


def write_atomically(path: Path, content: str) -> None:
    """Write a text file under a temporary name and rename it, so that it is never incomplete."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(content, "utf-8")
    _fsync(unfinished)
    os.replace(unfinished, path)


def publish(folder: Path, prefix: str) -> None:
    """Move `folder/out.*` to `prefix.*` and remove the folder. If this is interrupted, a second call completes it.

    An older output is removed first, so that an index never exists with the data of another output. The sample indices
    that upstream cached under `prefix/cache` are removed too, because their names do not depend on the data's content.

    Args:
        folder: folder of the complete files.
        prefix: path of the output without suffix, on the same file system.
    """
    if (folder / "out.bin").exists():
        for suffix in reversed(SUFFIXES):
            Path(prefix + suffix).unlink(missing_ok=True)
        for cached in Path(prefix, "cache").glob("*_indices"):
            shutil.rmtree(cached)
    for suffix in SUFFIXES:
        if (folder / f"out{suffix}").exists():
            os.replace(folder / f"out{suffix}", prefix + suffix)
    _fsync(folder.parent)
    shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
