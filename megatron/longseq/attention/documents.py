"""Packed documents: from upstream's dense attention mask to the runs that attention is planned from."""

import torch
from torch import Tensor

from megatron.longseq.attention.blocks import Documents, Run


def document_starts(attention_mask: Tensor, begin: int = 0) -> Tensor:
    """Return the position at which every row's document starts, [b, rows], int64.

    Args:
        attention_mask: bool [b, 1, rows, keys], True where a key is hidden (upstream's, with --reset-attention-mask);
            rows are the positions from `begin` on, keys those from 0 on.
        begin: position of the first row.

    Raises:
        ValueError: the mask is not that of causal attention inside documents that follow one another; says where.
    """
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1 or attention_mask.dtype != torch.bool:
        raise ValueError(
            f"an attention mask of {attention_mask.dtype} {tuple(attention_mask.shape)}: "
            "expected bool [b, 1, rows, keys]"
        )
    hidden = attention_mask[:, 0]
    rows, keys = hidden.shape[1:]
    if begin < 0 or begin + rows > keys:
        raise ValueError(f"an attention mask of rows {begin} to {begin + rows} has keys up to {keys} alone")
    position = torch.arange(begin, begin + rows, device=hidden.device)
    key = torch.arange(keys, device=hidden.device)
    starts = hidden.to(torch.uint8).argmin(-1)  # the first key that is seen; 0 where none is
    for sequence in range(hidden.shape[0]):
        start = starts[sequence]
        wanted = (key < start[:, None]) | (key > position[:, None])
        wrong = (hidden[sequence] != wanted).any(-1)
        wrong[1:] |= (start[1:] != start[:-1]) & (start[1:] != position[1:])
        if wrong.any():
            row = int(wrong.to(torch.uint8).argmax())
            raise ValueError(
                f"the attention mask is not causal within packed documents: sequence {sequence}, position "
                f"{begin + row} sees {int((~hidden[sequence, row]).sum())} keys, the first of them {int(start[row])}; "
                "a position must see all from its document's first to itself, and documents must not overlap"
            )
    return starts


def documents_of(starts: Tensor, begin: int = 0) -> Documents:
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
        sequences.append(tuple(Run(*run) for run in runs))
    return Documents(tuple(sequences))
