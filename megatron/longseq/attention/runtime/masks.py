"""Packed documents of a sequence whose rows of the attention mask are spread over context-parallel ranks."""

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.longseq.attention.plan.layout import Layout
from megatron.longseq.attention.plan.tiles import Documents
from megatron.longseq.attention.runtime.comm import GroupCollectives
from megatron.longseq.attention.runtime.packed_documents import NOT_DOCUMENTS, RULE, packed, read_document_starts


def gather_document_starts(mask: Tensor, layout: Layout, rank: int, exchange: GroupCollectives) -> Tensor:
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
        starts.append(read_document_starts(mask[:, :, row : row + span.size], span.begin))
        row += span.size
    # Rows that are wrong travel, too: an error of one rank alone would leave the others in the collective.
    gathered = exchange.all_gather(torch.cat(starts, dim=1).to(torch.int32).contiguous())
    whole = gathered.new_empty(gathered.shape[1], total)
    for source in range(layout.mesh.size):
        row = 0
        for span in _spans(layout, source):
            whole[:, span.slice()] = gathered[source, :, row : row + span.size]
            row += span.size
    if (whole < 0).any():
        sequence, position = (int(at[0]) for at in torch.nonzero(whole < 0, as_tuple=True))
        raise ValueError(f"{NOT_DOCUMENTS}: sequence {sequence}, position {position}; {RULE}")
    return whole


def _spans(layout: Layout, rank: int) -> list:
    return [span for segment in range(len(layout.lengths)) for span in layout.positions(rank, segment)]


def expand_to_batch(starts: Tensor, batch: int) -> Tensor:
    """Return the starts of every sequence of a batch, [batch, sequence]; a mask of one sequence is that of all.

    Raises:
        ValueError: a mask of another number of sequences.
    """
    if starts.shape[0] not in (1, batch):
        raise ValueError(f"an attention mask of {starts.shape[0]} sequences for a micro-batch of {batch}")
    return starts.expand(batch, -1)


@dataclass
class MaskReader:
    """Reads the documents of every micro-batch from its mask, once for all layers of a forward.

    A mask is another one as soon as it is another object, was changed in place, or a layer is handed it a second time:
    what NumPy or `.data` changed in place shows in no other way.

    Attributes:
        exchange: collectives of the context-parallel group.
        rank: this context-parallel rank.
        needs_mask: whether every stage must be handed a mask (--reset-attention-mask).
        stages: pipeline stages, virtual ones included. Upstream gives those between the first and the last no batch.
    """

    exchange: GroupCollectives
    rank: int
    needs_mask: bool = False
    stages: int = 1
    _last: "weakref.ref[Tensor] | None" = field(default=None, init=False)
    _version: int = field(default=0, init=False)
    _documents: Documents | None = field(default=None, init=False)
    _served: set[Hashable] = field(default_factory=set, init=False)

    def documents(self, mask: Tensor | None, layout: Layout, batch: int, layer: Hashable) -> Documents | None:
        """Return the documents of a micro-batch; None: every sequence is one. All context-parallel ranks call it.

        Args:
            mask: rows of this rank, see `gather_document_starts`; None: causal attention to the whole sequence.
            layout: of the tokens.
            batch: sequences of the micro-batch.
            layer: who asks.

        Raises:
            ValueError: --reset-attention-mask is given, but there is no mask; the mask is not that of documents; or it
                has documents, but there are stages that are handed none.
        """
        if mask is None:
            if self.needs_mask:
                raise ValueError(
                    "--reset-attention-mask is given, but this stage has no attention mask: with more than 2 pipeline "
                    "stages use --seq1f1b-splits, which hands documents from stage to stage."
                )
            return None
        version = 0 if mask.is_inference() else mask._version
        if self._last is None or self._last() is not mask or version != self._version or layer in self._served:
            self._served.clear()
            starts = gather_document_starts(mask, layout, self.rank, self.exchange)
            self._documents = self._checked(packed(expand_to_batch(starts, batch)))
            self._last, self._version = weakref.ref(mask), version
        self._served.add(layer)
        return self._documents

    def _checked(self, documents: Documents | None) -> Documents | None:
        if documents is not None and self.stages > 2:
            raise ValueError(
                f"the attention mask separates documents, but with {self.stages} pipeline stages (virtual ones "
                "included) those between the first and the last get no batch and would not hear of them: give "
                "--seq1f1b-splits 2 or more, which hands documents from stage to stage."
            )
        return documents
