"""Corpora of packed documents whose lengths are chosen: one or two tokens, primes, whole sequences, whole chunks."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy
import torch

EOD, VOCABULARY = 255, 256
WORDS = 32  # tokens that occur, few so that a model learns within some steps
# A document of one token is the end-of-document token alone.
RAGGED = (1, 2, 1, 1, 3, 5, 200, 7, 11, 2, 13, 17, 1, 19, 23, 29, 31, 37, 300, 41, 43, 2, 47, 53, 59, 61, 1, 67, 71)
# Every border is that of a chunk: of 2 or 4 ranks, or of a segment.
ALIGNED = (16, 32, 16, 64, 16, 128, 48, 16, 32, 80)


def write_documents(prefix: Path, lengths: Iterable[int], tokens: int, seed: int = 1) -> list[str]:
    """Write a data set and return upstream's flags that train on it.

    Args:
        prefix: path of the data set without its suffixes.
        lengths: lengths of documents with their end-of-document token, repeated until there are enough.
        tokens: least number of tokens of the data set.
        seed: seed of the tokens.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    generator = numpy.random.default_rng(seed)
    for length in _repeated(tuple(lengths), tokens):
        builder.add_document(torch.tensor([*_walk(generator, length - 1), EOD]), [length])
    builder.finalize(f"{prefix}.idx")
    return [
        *("--data-path", str(prefix), "--data-cache-path", str(prefix.parent / "cache"), "--split", "90,5,5"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY), "--null-tokenizer-eod-id", str(EOD)),
    ]


def _repeated(lengths: tuple[int, ...], tokens: int) -> Iterator[int]:
    written = 0
    while written < tokens:
        yield from lengths
        written += sum(lengths)


def _walk(generator: numpy.random.Generator, length: int) -> list[int]:
    """Return tokens whose successors a model can learn to predict: each follows the one before by a small step."""
    steps = generator.integers(1, 4, size=length)
    return [int(token) % WORDS for token in numpy.cumsum(steps) + generator.integers(0, WORDS)]
