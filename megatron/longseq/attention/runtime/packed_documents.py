"""Packed documents: from upstream's dense attention mask to the runs that attention is planned from."""

import torch
from torch import Tensor

from megatron.longseq.attention.plan.tiles import Documents, DocumentSpan

STRIP_ELEMENTS = 2**24  # of a mask that are compared at once: bounds the memory that reading takes

NOT_DOCUMENTS = "the attention mask is not causal within packed documents"
RULE = "a position must see all from its document's first to itself, and documents must not overlap"


def document_starts(attention_mask: Tensor, begin: int = 0) -> Tensor:
    """Return the position at which every row's document starts, [b, rows], int64.

    Args:
        attention_mask: bool [b, 1, rows, keys], True where a key is hidden (upstream's, with --reset-attention-mask);
            rows are the positions from `begin` on, keys those from 0 on.
        begin: position of the first row.

    Raises:
        ValueError: the mask is not that of causal attention inside documents that follow one another; says where.
    """
    starts = read_document_starts(attention_mask, begin)
    if (starts < 0).any():
        sequence, row = (int(at[0]) for at in torch.nonzero(starts < 0, as_tuple=True))
        seen = ~attention_mask[sequence, 0, row]
        first = int(seen.to(torch.uint8).argmax())
        raise ValueError(
            f"{NOT_DOCUMENTS}: sequence {sequence}, position {begin + row} sees {int(seen.sum())} keys, the first of "
            f"them {first}; {RULE}"
        )
    return starts


def read_document_starts(attention_mask: Tensor, begin: int = 0) -> Tensor:
    """As `document_starts`, but -1 in rows that are not those of documents; does not wait for the device.

    Raises:
        ValueError: the mask has another type or shape.
    """
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1 or attention_mask.dtype != torch.bool:
        raise ValueError(
            f"an attention mask of {attention_mask.dtype} {tuple(attention_mask.shape)}: "
            "expected bool [b, 1, rows, keys]"
        )
    hidden = attention_mask[:, 0]
    batch, rows, keys = hidden.shape
    if begin < 0 or begin + rows > keys:
        raise ValueError(f"an attention mask of rows {begin} to {begin + rows} has keys up to {keys} alone")
    position = torch.arange(begin, begin + rows, device=hidden.device)
    key = torch.arange(keys, device=hidden.device, dtype=torch.int32)
    starts = torch.empty(batch, rows, dtype=torch.int64, device=hidden.device)
    wrong = torch.empty(batch, rows, dtype=torch.bool, device=hidden.device)
    height = max(1, STRIP_ELEMENTS // max(1, batch * keys))
    for row in range(0, rows, height):
        strip = slice(row, row + height)
        part = hidden[:, strip].view(torch.uint8)
        starts[:, strip] = part.argmin(-1)  # the first key that is seen; 0 where none is
        wanted = key > position[strip, None].to(torch.int32)
        wanted = (key < starts[:, strip, None].to(torch.int32)).logical_or_(wanted)
        wrong[:, strip] = wanted.view(torch.uint8).bitwise_xor_(part).amax(-1).bool()
    wrong[:, 1:] |= (starts[:, 1:] != starts[:, :-1]) & (starts[:, 1:] != position[1:])
    return starts.masked_fill_(wrong, -1)


def packed(starts: Tensor) -> Documents | None:
    """Return the documents of whole sequences; None: each of them is one. Waits for the device.

    Raises:
        ValueError: see `documents_from_starts`.
    """
    documents = documents_from_starts(starts)
    return documents if any(len(runs) > 1 for runs in documents.runs) else None


def documents_from_starts(starts: Tensor, begin: int = 0) -> Documents:
    """Return the documents of the positions from `begin` on; waits for the device, so once a micro-batch.

    Args:
        starts: [b, rows], see `document_starts`.
        begin: position of the first.

    Raises:
        ValueError: the starts are not those of documents that follow one another.
    """
    sequences = []
    for row in starts.cpu():
        values, sizes = torch.unique_consecutive(row, return_counts=True)
        ends = (begin + sizes.cumsum(0)).tolist()
        runs = zip([begin, *ends[:-1]], ends, values.tolist(), strict=True)
        sequences.append(tuple(DocumentSpan(*run) for run in runs))
    return Documents(tuple(sequences))
