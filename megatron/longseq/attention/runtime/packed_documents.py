"""Packed documents, read from upstream's dense attention mask, also where its rows are distributed over ranks."""

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.longseq.attention.plan.layout import Layout
from megatron.longseq.attention.plan.ranges import Documents, DocumentSpan, TokenRange
from megatron.longseq.attention.runtime.comm import GroupCollectives

STRIP_ELEMENTS = 2**24  # elements of a mask that are compared at once; bounds the memory of reading it

NOT_DOCUMENTS = "the attention mask is not causal within packed documents"
RULE = "a position must see all from its document's first to itself, and documents must not overlap"


def of_batch_and_heads(mask: Tensor) -> Tensor:
    """Return a mask with the dimensions of a batch and of heads; one of [rows, keys] is that of all sequences.

    Upstream's local attention broadcasts such a mask over its scores.

    Args:
        mask: [rows, keys], [1, rows, keys], or [b, heads, rows, keys], which is returned unchanged.
    """
    if mask.dim() == 2:
        return mask[None, None]
    if mask.dim() == 3 and mask.shape[0] == 1:
        return mask[None]
    return mask


def document_starts(attention_mask: Tensor, begin: int = 0) -> Tensor:
    """Return the first position of every row's document, [b, rows], int64.

    Args:
        attention_mask: bool [b, 1, rows, keys], True where a key is hidden (upstream's, with --reset-attention-mask);
            also [rows, keys] and [1, rows, keys]. Rows are the positions from `begin` on, keys the positions from 0 on.
        begin: position of the first row.

    Raises:
        ValueError: The mask is not causal within documents that follow one another; names the position.
    """
    attention_mask = of_batch_and_heads(attention_mask)
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
    """Return what `document_starts` does, with -1 in wrong rows; does not synchronize with the device.

    Args:
        attention_mask: bool [b, 1, rows, keys].
        begin: position of the first row.

    Returns:
        int64 [b, rows], on the mask's device.

    Raises:
        ValueError: The mask has another type or shape.
    """
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1 or attention_mask.dtype != torch.bool:
        raise ValueError(
            f"the attention mask is {attention_mask.dtype} {tuple(attention_mask.shape)}; expected bool [b, 1, rows, "
            "keys]"
        )
    hidden = attention_mask[:, 0]
    batch, rows, keys = hidden.shape
    if begin < 0 or begin + rows > keys:
        raise ValueError(f"the attention mask has rows {begin} to {begin + rows}, but keys only up to {keys}")
    position = torch.arange(begin, begin + rows, device=hidden.device)
    key = torch.arange(keys, device=hidden.device, dtype=torch.int32)
    starts = torch.empty(batch, rows, dtype=torch.int64, device=hidden.device)
    wrong = torch.empty(batch, rows, dtype=torch.bool, device=hidden.device)
    height = max(1, STRIP_ELEMENTS // max(1, batch * keys))
    for row in range(0, rows, height):
        strip = slice(row, row + height)
        part = hidden[:, strip].view(torch.uint8)
        starts[:, strip] = part.argmin(-1)  # the first key that is seen; 0 if there is none
        expected = key > position[strip, None].to(torch.int32)
        expected = (key < starts[:, strip, None].to(torch.int32)).logical_or_(expected)
        wrong[:, strip] = expected.view(torch.uint8).bitwise_xor_(part).amax(-1).bool()
    wrong[:, 1:] |= (starts[:, 1:] != starts[:, :-1]) & (starts[:, 1:] != position[1:])
    return starts.masked_fill_(wrong, -1)


def gather_document_starts(mask: Tensor, layout: Layout, rank: int, collectives: GroupCollectives) -> Tensor:
    """Return the first position of every token's document, [b, sequence], int32. All context-parallel ranks call this.

    Args:
        mask: bool [b, 1, rows, sequence] or without b and 1, see `document_starts`; rows are this rank's positions in
            order.
        layout: positions of the tokens.
        rank: this context-parallel rank.
        collectives: collectives of the context-parallel group.

    Raises:
        ValueError: The mask's shape does not fit the layout, or the mask is not that of documents.
    """
    mask, total = of_batch_and_heads(mask), sum(layout.lengths)
    if mask.dim() != 4 or (mask.shape[2] * layout.mesh.size, mask.shape[3]) != (total, total):
        raise ValueError(
            f"context-parallel rank {rank} of {layout.mesh.size}: the attention mask has shape {tuple(mask.shape)}, "
            f"but a sequence of {total} tokens needs [b, 1, {total // layout.mesh.size}, {total}]"
        )
    starts, row = [], 0
    for one in _positions(layout, rank):
        starts.append(read_document_starts(mask[:, :, row : row + one.size], one.begin))
        row += one.size
    # Wrong rows are gathered, too: if only the rank that has them raised, the others would hang in the collective.
    gathered = collectives.all_gather(torch.cat(starts, dim=1).to(torch.int32).contiguous())
    whole = gathered.new_empty(gathered.shape[1], total)
    for source in range(layout.mesh.size):
        row = 0
        for one in _positions(layout, source):
            whole[:, one.slice()] = gathered[source, :, row : row + one.size]
            row += one.size
    if (whole < 0).any():
        sequence, position = (int(at[0]) for at in torch.nonzero(whole < 0, as_tuple=True))
        raise ValueError(f"{NOT_DOCUMENTS}: sequence {sequence}, position {position}; {RULE}")
    return whole


def _positions(layout: Layout, rank: int) -> list[TokenRange]:
    return [one for segment in range(len(layout.lengths)) for one in layout.positions(rank, segment)]


def expand_to_batch(starts: Tensor, batch: int) -> Tensor:
    """Return the starts of every sequence of a batch, [batch, sequence]; a mask of one sequence is that of all.

    Args:
        starts: [1 or batch, sequence].
        batch: sequences of the micro-batch.

    Raises:
        ValueError: The mask is of another number of sequences.
    """
    if starts.shape[0] not in (1, batch):
        raise ValueError(f"the attention mask has {starts.shape[0]} sequences, but the micro-batch has {batch}")
    return starts.expand(batch, -1)


def packed_documents(starts: Tensor) -> Documents | None:
    """Return the documents of whole sequences; None if each sequence is one. Synchronizes with the device.

    Args:
        starts: first position of every token's document, [b, sequence].

    Raises:
        ValueError: See `documents_from_starts`.
    """
    documents = documents_from_starts(starts)
    return documents if any(len(spans) > 1 for spans in documents.spans) else None


def documents_from_starts(starts: Tensor, begin: int = 0) -> Documents:
    """Return the documents of consecutive positions. Synchronizes with the device.

    Args:
        starts: [b, rows], see `document_starts`.
        begin: position of the first row.

    Raises:
        ValueError: The starts are not those of documents that follow one another.
    """
    sequences = []
    for row in starts.cpu():
        values, sizes = torch.unique_consecutive(row, return_counts=True)
        ends = (begin + sizes.cumsum(0)).tolist()
        spans = zip([begin, *ends[:-1]], ends, values.tolist(), strict=True)
        sequences.append(tuple(DocumentSpan(*span) for span in spans))
    return Documents(tuple(sequences))


def starts_of(documents: Documents) -> Tensor:
    """Return the first position of every token's document, int32 [b, sequence], on the host."""
    rows = [
        torch.cat([torch.full((span.end - span.begin,), span.start, dtype=torch.int32) for span in spans])
        for spans in documents.spans
    ]
    return torch.stack(rows)


@dataclass
class MaskReader:
    """Reads the documents of every micro-batch from its mask, once for all layers of a forward.

    A mask counts as new if it is another object, was changed in place, or is handed to a layer a second time, because
    changes through NumPy or `.data` are not visible in any other way.

    Attributes:
        collectives, rank: see `gather_document_starts`.
        needs_mask: whether every stage must be given a mask (--reset-attention-mask).
        stages: pipeline stages, virtual ones included. Upstream gives those between the first and the last no batch.
    """

    collectives: GroupCollectives
    rank: int
    needs_mask: bool = False
    stages: int = 1
    _last: "weakref.ref[Tensor] | None" = field(default=None, init=False)
    _version: int = field(default=0, init=False)
    _documents: Documents | None = field(default=None, init=False)
    _served: set[Hashable] = field(default_factory=set, init=False)

    def documents(self, mask: Tensor | None, layout: Layout, batch: int, layer: Hashable) -> Documents | None:
        """Return the documents of a micro-batch; None if each sequence is one. All context-parallel ranks call this.

        Args:
            mask: rows of this rank, see `gather_document_starts`; None: causal attention to the whole sequence.
            layout: positions of the tokens.
            batch: number of sequences.
            layer: identifies the calling layer.

        Raises:
            ValueError: --reset-attention-mask is given but there is no mask; the mask is not that of documents; or it
                has documents, but some stages are given no mask.
        """
        if mask is None:
            if self.needs_mask:
                raise ValueError(
                    "--reset-attention-mask: the script passes neither packed_seq_params nor an attention mask to the "
                    "model; pass those of the batch on every pipeline stage."
                )
            return None
        version = 0 if mask.is_inference() else mask._version
        if self._last is None or self._last() is not mask or version != self._version or layer in self._served:
            self._served.clear()
            starts = gather_document_starts(mask, layout, self.rank, self.collectives)
            self._documents = self._checked(packed_documents(expand_to_batch(starts, batch)))
            self._last, self._version = weakref.ref(mask), version
        self._served.add(layer)
        return self._documents

    def _checked(self, documents: Documents | None) -> Documents | None:
        if documents is not None and self.stages > 2:
            raise ValueError(
                f"the attention mask separates documents, but with {self.stages} pipeline stages (including virtual "
                "ones), the stages between the first and the last get no batch and no mask. Pass packed_seq_params on "
                "every stage, or give --seq1f1b-splits 2 or more, which sends document boundaries from stage to stage."
            )
        return documents
