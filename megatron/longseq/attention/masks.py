"""Packed documents of a sequence whose rows of the attention mask are spread over context-parallel ranks."""

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.longseq.attention.blocks import Documents
from megatron.longseq.attention.documents import document_starts, documents_of
from megatron.longseq.attention.lanes import Exchange
from megatron.longseq.attention.layout import Layout


def whole_starts(mask: Tensor, layout: Layout, rank: int, exchange: Exchange) -> Tensor:
    """Return the position at which every token's document starts, [b, sequence], int32; every rank calls it.

    Args:
        mask: bool [b, 1, rows, sequence], see `documents.document_starts`; rows of the rank's positions, in its order.
        layout: of the tokens.
        rank: this context-parallel rank.
        exchange: collectives of the context-parallel group.

    Raises:
        ValueError: rows or columns that are not the layout's, or another mask than that of documents.
    """
    total = sum(layout.lengths)
    if mask.dim() != 4 or (mask.shape[2] * layout.mesh.size, mask.shape[3]) != (total, total):
        raise ValueError(
            f"context-parallel rank {rank} of {layout.mesh.size}: an attention mask of {tuple(mask.shape)} for a "
            f"sequence of {total} tokens; expected [b, 1, {total // layout.mesh.size}, {total}]"
        )
    starts, row = [], 0
    for span in _spans(layout, rank):
        starts.append(document_starts(mask[:, :, row : row + span.size], span.begin))
        row += span.size
    gathered = exchange.all_gather(torch.cat(starts, dim=1).to(torch.int32).contiguous())
    whole = gathered.new_empty(gathered.shape[1], total)
    for source in range(layout.mesh.size):
        row = 0
        for span in _spans(layout, source):
            whole[:, span.slice()] = gathered[source, :, row : row + span.size]
            row += span.size
    return whole


def _spans(layout: Layout, rank: int) -> list:
    return [span for segment in range(len(layout.lengths)) for span in layout.positions(rank, segment)]


@dataclass
class MaskReader:
    """Reads the documents of a micro-batch once, though every layer is given its mask.

    Attributes:
        exchange: collectives of the context-parallel group.
        rank: this context-parallel rank.
        packs_documents: whether masks separate documents (--reset-attention-mask).
    """

    exchange: Exchange
    rank: int
    packs_documents: bool
    _last: "weakref.ref[Tensor] | None" = field(default=None, init=False)
    _documents: Documents | None = field(default=None, init=False)
    _seen: bool = field(default=False, init=False)

    def documents(self, mask: Tensor | None, layout: Layout) -> Documents | None:
        """Return the documents of a sequence; None: it is one.

        Raises:
            ValueError: the mask separates documents, but --reset-attention-mask is not given; or it is missing though
                that is given.
        """
        if not self.packs_documents:
            if mask is not None and not self._seen:
                self._seen = True  # the same for all micro-batches: upstream's dataset makes it once
                if whole_starts(mask, layout, self.rank, self.exchange).any():
                    raise ValueError(
                        "the script's attention mask separates documents, but --reset-attention-mask is not given; "
                        "give it, so that the mask of every micro-batch is read."
                    )
            return None
        if mask is None:
            raise ValueError(
                "--reset-attention-mask is given, but this stage has no attention mask: with more than 2 pipeline "
                "stages use --seq1f1b-splits, which hands documents from stage to stage."
            )
        if self._last is None or self._last() is not mask:
            self._documents = documents_of(whole_starts(mask, layout, self.rank, self.exchange))
            self._last = weakref.ref(mask)
        return self._documents
