"""Documents of a packed micro-batch from cumulative lengths (`cu_seqlens`), and the positions of tokens in them."""

import itertools
from collections.abc import Sequence

from megatron.longseq.attention.plan.ranges import Documents, DocumentSpan, TokenRange

ONE_MICRO_BATCH = "cu_seqlens of one micro-batch begin with 0, never fall, and end with its number of tokens"


def documents_of(borders: Sequence[int], sequences: int, length: int) -> Documents:
    """Return the documents of a micro-batch.

    Args:
        borders: cumulative lengths of the documents of all sequences, one after the other, from 0 to `sequences` times
            `length`. A document of no tokens is dropped, so the last number may be repeated.
        sequences: number of sequences of the micro-batch.
        length: tokens of a sequence.

    Raises:
        ValueError: The borders are not those of this micro-batch, or a document lies in two sequences.
    """
    total = sequences * length
    if len(borders) < 2 or borders[0] != 0:
        raise ValueError(f"cu_seqlens {_shown(borders)}: {ONE_MICRO_BATCH}")
    for index in range(1, len(borders)):
        if borders[index] < borders[index - 1]:
            raise ValueError(
                f"cu_seqlens fall from {borders[index - 1]} to {borders[index]} at index {index}: {ONE_MICRO_BATCH}"
            )
    if borders[-1] != total:
        raise ValueError(
            f"cu_seqlens end with {borders[-1]}, but the micro-batch has {total} tokens ({sequences} sequences of "
            f"{length}): {ONE_MICRO_BATCH}"
        )
    spans: list[list[DocumentSpan]] = [[] for _ in range(sequences)]
    for begin, end in itertools.pairwise(borders):
        if begin == end:
            continue
        sequence = begin // length
        first = sequence * length
        if end > first + length:
            raise ValueError(
                f"cu_seqlens: the document of tokens {begin} to {end} lies in two sequences, of {length} tokens each; "
                "each sequence of a micro-batch holds whole documents"
            )
        spans[sequence].append(DocumentSpan(begin - first, end - first, begin - first))
    return Documents(tuple(tuple(one) for one in spans))


def has_borders(documents: Documents) -> bool:
    """Return whether any sequence holds more than one document."""
    return any(len(spans) > 1 for spans in documents.spans)


def positions_in_documents(documents: Documents, sequence: int, positions: Sequence[TokenRange]) -> list[TokenRange]:
    """Return the positions, counted from the start of each token's document, of some tokens of a sequence.

    Args:
        documents: documents of the micro-batch.
        sequence: index of the sequence.
        positions: ranges of positions in the sequence, in the order in which a rank holds them.

    Returns:
        Ranges of positions in documents, in the order of `positions`: one for each piece of a document.
    """
    return [
        TokenRange(span.begin - span.start, span.end - span.start)
        for one in positions
        for span in documents.within(sequence, one)
    ]


def _shown(borders: Sequence[int]) -> str:
    most = 8
    listed = ", ".join(str(border) for border in borders[:most])
    return f"[{listed}{', ...' if len(borders) > most else ''}]"
