"""What the head of an index file (`.idx`) of upstream's says about its data, held to the sizes of both files."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = 34  # bytes: the magic word, the version, the type of the tokens, the numbers of sequences and of documents
BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # of a token, by upstream's code of its type
LENGTH, POINTER = 4, 8  # bytes of an entry
CHUNK = 1 << 20  # lengths that are read at once

AGAIN = "Copy both files again, or prepare them again (python -m megatron.longseq.data prepare ... --overwrite)."


@dataclass(frozen=True)
class Index:
    """One data set on disk.

    Attributes:
        prefix: its path without suffix.
        documents: entries of the index; upstream's GPT data set takes each as a document.
    """

    prefix: str
    documents: int

    def reaches(self, share: range, tokens: int) -> bool:
        """Whether these documents together hold at least so many tokens; reads no more lengths than that takes."""
        held = 0
        for lengths in self._lengths(share):
            held += int(lengths.sum())
            if held >= tokens:
                return True
        return held >= tokens

    def _lengths(self, share: range) -> Iterator[np.ndarray]:
        with open(f"{self.prefix}.idx", "rb") as stream:
            stream.seek(HEADER + LENGTH * share.start)
            for start in range(share.start, share.stop, CHUNK):
                count = min(CHUNK, share.stop - start)
                yield np.frombuffer(stream.read(count * LENGTH), dtype=np.int32).astype(np.int64)


def read_index(prefix: str) -> Index | None:
    """Read the head of `prefix`.idx and compare it with the sizes of both files; None where one of them is missing.

    Raises:
        ValueError: the files are damaged or do not belong together; says which, why and what to do.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if not (idx.is_file() and data.is_file()):
        return None
    with open(idx, "rb") as stream:
        head = stream.read(HEADER)
        if len(head) < HEADER or not head.startswith(MAGIC):
            raise ValueError(f"{idx} is no index of upstream's (it begins with {head[:9]!r}). {AGAIN}")
        _, code, sequences, bounds = struct.unpack("<QBQQ", head[len(MAGIC) :])
        if code not in BYTES:
            raise ValueError(f"{idx} names a type of tokens that upstream does not have (code {code}). {AGAIN}")
        wanted = HEADER + sequences * (LENGTH + POINTER) + bounds * POINTER
        size = os.path.getsize(idx)
        if size < wanted:
            raise ValueError(f"{idx} has {size:,} bytes; for its {sequences:,} documents it needs {wanted:,}. {AGAIN}")
        wanted, size = _data_bytes(stream, sequences, BYTES[code]), os.path.getsize(data)
    if size < wanted:
        raise ValueError(
            f"{data} has {size:,} bytes, and {idx.name} speaks of {wanted:,}: the data were cut short, or the index "
            f"belongs to other data. {AGAIN}"
        )
    return Index(prefix, sequences)


def _data_bytes(stream: BinaryIO, sequences: int, token_bytes: int) -> int:
    """Return where the last sequence ends in the data."""
    if not sequences:
        return 0
    stream.seek(HEADER + LENGTH * (sequences - 1))
    (length,) = struct.unpack("<i", stream.read(LENGTH))
    stream.seek(HEADER + LENGTH * sequences + POINTER * (sequences - 1))
    (start,) = struct.unpack("<q", stream.read(POINTER))
    return int(start) + int(length) * token_bytes
