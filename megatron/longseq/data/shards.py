"""The plan of work: files cut into shards of about equal bytes, large jsonl files by byte ranges at line boundaries."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from megatron.longseq.data.corpus import Kind, SourceFile

# Opening a file costs about as much as reading this many bytes: ten thousand tiny files are work too.
FILE_COST = 4096
SMALLEST, LARGEST, WANTED = 1 << 20, 256 << 20, 1024


@dataclass(frozen=True)
class Piece:
    """Bytes `[start, stop)` of one file: a whole text file, or the lines of a jsonl file that begin in the range."""

    path: str
    kind: Kind
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes in the range."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One unit of work and of resumption; documents keep the order of the shards and of the pieces inside."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)


def default_shard_bytes(files: Iterable[SourceFile]) -> int:
    """Choose a shard size in bytes from the input alone (never from the number of workers)."""
    total = sum(file.size for file in files)
    return min(max(total // WANTED, SMALLEST), LARGEST)


def plan(files: Sequence[SourceFile], shard_bytes: int) -> list[Shard]:
    """Pack the files, in order, into shards of at least `shard_bytes` (the last one may be smaller).

    Raises:
        ValueError: `shard_bytes` is not positive.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard size {shard_bytes}: a shard needs at least one byte")
    shards: list[Shard] = []
    pieces: list[Piece] = []
    weight = 0
    for file in files:
        for piece in _pieces(file, shard_bytes):
            pieces.append(piece)
            weight += piece.size + FILE_COST
            if weight >= shard_bytes:
                shards.append(Shard(len(shards), tuple(pieces)))
                pieces, weight = [], 0
    if pieces:
        shards.append(Shard(len(shards), tuple(pieces)))
    return shards


def _pieces(file: SourceFile, shard_bytes: int) -> Iterator[Piece]:
    step = shard_bytes if file.kind == "jsonl" else max(file.size, 1)
    for start in range(0, max(file.size, 1), step):
        yield Piece(file.path, file.kind, start, min(start + step, file.size))


def owned_lines(stream: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Yield the lines (split at LF only, without it) that begin in bytes `[start, stop)` of a seekable stream.

    Ranges that cover a file yield each of its lines exactly once, so ranges need no look at the file. A final LF
    opens no further line.
    """
    position = start
    if start > 0:
        # The line under way at `start` belongs to an earlier range, unless the byte before `start` ended it.
        stream.seek(start - 1)
        position = start - 1 + len(stream.readline(stop - start + 1))
    else:
        stream.seek(0)
    while position < stop:
        line = stream.readline()
        if not line:
            return
        position += len(line)
        yield line.removesuffix(b"\n")
