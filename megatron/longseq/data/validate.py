"""Check, before any process group exists, that the data sets of a run can provide what it needs.

Upstream searches for samples without end in a part that holds no tokens, and reads damaged index files until it fails
inside NumPy.
"""

import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron.longseq.data import LOSS_MASK
from megatron.longseq.data.splits import DEFAULT, NAMES, split_ranges, suggest_split_flags

Blend = tuple[Sequence[str], Sequence[float] | None]  # prefixes of data sets, and their weights if they are given

MAGIC = b"MMIDIDX\x00\x00"
HEADER = 34  # bytes: magic word, version, dtype code, number of sequences, number of document bounds
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # by upstream's dtype code
LENGTH, POINTER = 4, 8  # bytes of an entry in the arrays after the header
CHUNK = 1 << 20  # document lengths that are read at once

PREPARE_AGAIN = (
    "Copy both files again, or prepare them again (python -m megatron.longseq.data prepare ... --overwrite)."
)
MORE_DOCUMENTS = "A text file is one document; a .jsonl file with one document per line gives more of them."


@dataclass(frozen=True)
class IndexedFile:
    """One indexed data set on disk.

    Attributes:
        prefix: path without suffix.
        documents: number of sequences in the index. Upstream's GPT data set treats each one as a document.
    """

    prefix: str
    documents: int

    def has_tokens(self, part: range, tokens: int) -> bool:
        """Return whether the documents `part` hold at least `tokens` tokens. Stop reading lengths once they do.

        Args:
            part: numbers of the documents.
            tokens: number of tokens to find.
        """
        total = 0
        for lengths in self.lengths(part):
            total += int(lengths.sum())
            if total >= tokens:
                return True
        return total >= tokens

    def lengths(self, part: range) -> Iterator[np.ndarray]:
        """Yield the lengths of the documents `part` in tokens, up to `CHUNK` at a time.

        Args:
            part: numbers of the documents.

        Yields:
            int64 [at most `CHUNK`].
        """
        with open(f"{self.prefix}.idx", "rb") as stream:
            stream.seek(HEADER + LENGTH * part.start)
            for start in range(part.start, part.stop, CHUNK):
                count = min(CHUNK, part.stop - start)
                yield np.frombuffer(stream.read(count * LENGTH), dtype=np.int32).astype(np.int64)


def read_index(prefix: str) -> IndexedFile | None:
    """Read the header of `prefix`.idx and compare it with the sizes of both files.

    Returns:
        The data set, or None if one of the files does not exist.

    Raises:
        ValueError: the files are damaged or do not belong together. The message says which, why and what to do.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if not (idx.is_file() and data.is_file()):
        return None
    with open(idx, "rb") as stream:
        head = stream.read(HEADER)
        if len(head) < HEADER or not head.startswith(MAGIC):
            raise ValueError(f"{idx} is not an index of upstream's (it begins with {head[:9]!r}). {PREPARE_AGAIN}")
        _, code, sequences, bounds = struct.unpack("<QBQQ", head[len(MAGIC) :])
        if code not in TOKEN_BYTES:
            raise ValueError(f"{idx} names a dtype that upstream does not have (code {code}). {PREPARE_AGAIN}")
        needed = HEADER + sequences * (LENGTH + POINTER) + bounds * POINTER
        size = os.path.getsize(idx)
        if size < needed:
            raise ValueError(
                f"{idx} has {size:,} bytes, but needs {needed:,} for its {sequences:,} documents. {PREPARE_AGAIN}"
            )
        needed, size = _data_bytes(stream, sequences, TOKEN_BYTES[code]), os.path.getsize(data)
    if size < needed:
        raise ValueError(
            f"{data} has {size:,} bytes, but {idx.name} describes {needed:,}: the data is truncated, or the index "
            f"belongs to other data. {PREPARE_AGAIN}"
        )
    return IndexedFile(prefix, sequences)


def _data_bytes(stream: BinaryIO, sequences: int, token_bytes: int) -> int:
    """Return the byte at which the last sequence ends in the data file."""
    if not sequences:
        return 0
    stream.seek(HEADER + LENGTH * (sequences - 1))
    (length,) = struct.unpack("<i", stream.read(LENGTH))
    stream.seek(HEADER + LENGTH * sequences + POINTER * (sequences - 1))
    (start,) = struct.unpack("<q", stream.read(POINTER))
    return int(start) + int(length) * token_bytes


def check_datasets(
    blend: Blend | None,
    per_part: Sequence[Blend | None] | None,
    *,
    split: str | None,
    sequence: int,
    full_validation: bool,
    separate_validation: bool,
) -> None:
    """Refuse data sets that give a part of the run no document, no token or no sample.

    Data that is not on a local disk is not checked. Upstream reports it if it is missing.

    Args:
        blend: the data that `split` divides into parts, or None if each part has its own data.
        per_part: the data of train, valid and test, if each part has its own.
        split: upstream's --split.
        sequence: tokens per sample.
        full_validation: --full-validation, which reads each validation sample once.
        separate_validation: --multiple-validation-sets, which does not blend the validation sets, so that their weights
            are not used.

    Raises:
        ValueError: a data set cannot be used. The message names it, the part, and flags that work.
    """
    if blend is not None and split is not None:
        _check_weights(blend, "--data-path")
        datasets = _local_datasets(blend)
        for dataset in datasets:
            _check_not_empty(dataset, "--data-path")
        _check_split(datasets, split)
        reads_once = len(blend[0]) > 1 and blend[1] is None
        for dataset in datasets:
            for name, part in zip(NAMES, split_ranges(split, dataset.documents), strict=True):
                if part is not None:
                    once = reads_once or (full_validation and name == "valid")
                    _check_length(dataset, part, name, sequence if once else 0)
    for name, own in zip(NAMES, per_part or (), strict=False):
        if own is None:
            continue
        is_blended = len(own[0]) > 1 and not (separate_validation and name == "valid")
        if is_blended:
            _check_weights(own, f"the {name} data")
        once = (is_blended and own[1] is None) or (full_validation and name == "valid")
        for dataset in _local_datasets(own):
            _check_not_empty(dataset, f"the {name} data")
            _check_length(dataset, range(dataset.documents), name, sequence if once else 0)


def _local_datasets(blend: Blend) -> list[IndexedFile]:
    found = (None if "://" in prefix else read_index(prefix) for prefix in blend[0])
    datasets = [dataset for dataset in found if dataset is not None]
    for dataset in datasets:
        if Path(f"{dataset.prefix}{LOSS_MASK}.idx").is_file():
            _check_loss_mask(dataset)
    return datasets


def _check_loss_mask(dataset: IndexedFile) -> None:
    """Refuse conversations whose loss mask is damaged or belongs to others."""
    mask = read_index(dataset.prefix + LOSS_MASK)
    whole = range(dataset.documents)
    if mask is None or mask.documents != dataset.documents or not _equal(mask.lengths(whole), dataset.lengths(whole)):
        raise ValueError(
            f"{dataset.prefix}{LOSS_MASK} (.bin, .idx) is not the loss mask of the conversations of {dataset.prefix}. "
            f"{PREPARE_AGAIN}"
        )


def _equal(left: Iterator[np.ndarray], right: Iterator[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(left, right, strict=True))


def _check_weights(blend: Blend, where: str) -> None:
    for prefix, weight in zip(blend[0], blend[1] or (), strict=False):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"{where}: {prefix} has the weight {weight:g}, but upstream requires weights above 0. Leave it out, or "
                "give it a weight."
            )


def _check_not_empty(dataset: IndexedFile, where: str) -> None:
    if not dataset.documents:
        raise ValueError(f"{where}: {dataset.prefix} holds no documents. Leave it out, or prepare it again.")


def _check_split(datasets: Sequence[IndexedFile], split: str) -> None:
    """Refuse a split under which a part gets no document of a data set."""
    lines = []
    for dataset in datasets:
        for name, part in zip(NAMES, split_ranges(split, dataset.documents), strict=True):
            if part is not None and not part:
                lines.append(f"  {name}: none of the {dataset.documents} document(s) of {dataset.prefix}")
    if not lines:
        return
    fewest = min(dataset.documents for dataset in datasets)
    works = " ".join(suggest_split_flags(fewest) or ["--split", DEFAULT])
    raise ValueError(
        f"--split {split.replace(' ', '')} leaves parts without a document, in which upstream would search for samples "
        "without end:\n"
        + "\n".join(lines)
        + f"\nGive {works}, or 1,0,0 with --eval-iters 0 to train only, or data for each part (--train-data-path, "
        f"--valid-data-path, --test-data-path). {MORE_DOCUMENTS}"
    )


def _check_length(dataset: IndexedFile, part: range, name: str, sequence: int) -> None:
    """Refuse documents without tokens, or with less than one sample of `sequence` tokens (0: not required)."""
    if not dataset.has_tokens(part, 1):
        raise ValueError(
            f"{name}: documents {part.start} to {part.stop - 1} of {dataset.prefix} hold no tokens, and upstream would "
            "search for samples without end. Prepare the data again, or choose another --split."
        )
    if sequence and not dataset.has_tokens(part, sequence + 1):
        raise ValueError(
            f"{name}: documents {part.start} to {part.stop - 1} of {dataset.prefix} hold fewer than the "
            f"{sequence + 1} tokens of one sample (--seq-length {sequence}), but each sample is read once "
            "(--full-validation, or several data sets without weights). Give more data, or a shorter --seq-length."
        )


def indices_match(lengths: np.ndarray, documents: np.ndarray, samples: np.ndarray, sequence: int) -> bool:
    """Return whether cached sample indices belong to data with these document lengths.

    Args:
        lengths: tokens of each document.
        documents: document numbers in reading order.
        samples: [samples + 1, 2], where each sample begins: a position in `documents` and a token of that document.
        sequence: distance between the beginnings of two samples in tokens. The last sample may be shorter.
    """
    if not len(documents):
        return len(samples) == 1
    if int(documents.max()) >= len(lengths):
        return False

    def tokens_before(row: int) -> int | None:
        position, token = (int(number) for number in samples[row])
        if position >= len(documents) or token > int(lengths[documents[position]]):
            return None
        return int(lengths[documents[:position]].sum(dtype=np.int64)) + token

    last = len(samples) - 1
    end = tokens_before(last)
    if end is None or not (last - 1) * sequence < end <= last * sequence:
        return False
    return last < 1 or tokens_before(last - 1) == (last - 1) * sequence
