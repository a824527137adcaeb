"""Lengths of the documents of some steps, from a file or from a named corpus."""

import random
from pathlib import Path

from megatron.longseq.flexsp.tools.cli import read_lengths
from megatron.longseq.flexsp.tools.simulate import CORPORA, draw_lengths

_SEED = 1
_SHORTEST = 1024  # tokens of the longest document of a named corpus
_DRAWN = 4096  # documents of a corpus from which steps of a number of tokens are drawn at a time


def steps_of(source: str, seq_length: int, documents: int | None, tokens: int | None, count: int) -> list[list[int]]:
    """Return the lengths of the documents of some steps; they are drawn at random, always the same ones.

    Args:
        source: a file with one length a line, from which documents are drawn with repetition, or one of `CORPORA`.
        seq_length: most tokens of a document; longer ones are split, as --flexsp-overlong split does.
        documents: documents of a step; None: as many as hold `tokens`.
        tokens: tokens of a step.
        count: number of steps.

    Raises:
        ValueError: the source is neither a file nor a corpus, or a line of it is no length.
    """
    generator = random.Random(_SEED)
    if source in CORPORA:
        if seq_length < _SHORTEST:
            raise ValueError(f"--seq-length {seq_length} with --lengths {source}: give at least {_SHORTEST}")
        known = draw_lengths(source, max(_DRAWN, count * (documents or 0)), _SEED, seq_length)
    elif Path(source).is_file():
        known = read_lengths(Path(source))
    else:
        raise ValueError(f"--lengths {source}: neither a file nor one of {', '.join(CORPORA)}")
    known = [part for length in known for part in _split(length, seq_length)]
    steps = []
    for _ in range(count):
        if documents is not None:
            steps.append(generator.choices(known, k=documents))
            continue
        step: list[int] = []
        left = tokens or 0
        while left > 0:
            step.append(generator.choice(known))
            left -= step[-1]
        steps.append(step)
    return steps


def _split(length: int, most: int) -> list[int]:
    """Return the lengths of the documents into which a document is split."""
    parts = [most] * (length // most)
    return [*parts, length % most] if length % most else parts
