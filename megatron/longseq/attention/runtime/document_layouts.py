"""Layouts of packed micro-batches over context-parallel ranks: chosen once, for the data and for the model."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron.core.utils import log_single_rank

from megatron.longseq.attention.plan.comm_type import CommType
from megatron.longseq.attention.plan.layout import Layout, Mesh, Pieces
from megatron.longseq.attention.plan.layout_choice import LayoutChoice, LayoutKind, choose_layout
from megatron.longseq.attention.plan.ranges import Documents

logger = logging.getLogger(__name__)

RECENT = 16  # micro-batches whose choices are kept: those between the cut of their data and their forward


@dataclass
class DocumentLayouts:
    """Chooses the layout of every packed micro-batch on one rank; all ranks choose alike.

    Attributes:
        types: communication of the layers; empty: there is one context-parallel rank.
        lengths: tokens of every segment (--seq1f1b-splits) of the current micro-batch; None: a sequence is one segment.
        kind: --context-parallel-layout.
        window: --ring-window.
        sliding: number of layers with each sliding window (`choose_layout`); None: no layer has one.
        say: prints the first choice; later ones that differ go to the log.
    """

    types: tuple[CommType, ...] = ()
    lengths: tuple[int, ...] | None = None
    kind: LayoutKind = "auto"
    window: int | None = None
    sliding: Mapping[int | None, int] | None = None
    say: Callable[[str], None] = field(default=lambda line: None)
    _recent: "OrderedDict[tuple[Documents, tuple[int, ...]], LayoutChoice]" = field(
        default_factory=OrderedDict, init=False
    )
    _last_cut: Documents | None = field(default=None, init=False)
    _last_kind: str | None = field(default=None, init=False)

    def layout(self, documents: Documents, length: int) -> Layout:
        """Return where the tokens of a sequence are before the all-to-all.

        Args:
            documents: documents of the micro-batch.
            length: tokens of a whole sequence.
        """
        ranks = self.types[0].mesh.size if self.types else 1
        return Layout(Mesh(ranks, 1), self.lengths or (length,), pieces=self.pieces(documents, length))

    def pieces(self, documents: Documents, length: int) -> Pieces | None:
        """Return `Layout.pieces` of a micro-batch; None: it is distributed by sequence.

        Args:
            documents: documents of the micro-batch.
            length: tokens of a whole sequence.
        """
        return self._choice(documents, length).pieces if self.types else None

    def cut(self, documents: Documents, length: int) -> Layout:
        """Return `layout` for the data of a micro-batch, which this rank then cuts accordingly.

        Args:
            documents, length: see `layout`.
        """
        self._last_cut = documents
        return self.layout(documents, length)

    def check_cut(self, documents: Documents, length: int, where: str) -> None:
        """Check that the data which the model is called with was cut in the layout of its documents.

        Args:
            documents: documents that the script hands to the model.
            length: tokens of a whole sequence.
            where: rank, for the message.

        Raises:
            ValueError: The data was cut otherwise.
        """
        cut = self._last_cut
        if cut is None and self.pieces(documents, length) is None:
            return
        if cut != documents and (cut is None or self.pieces(cut, length) != self.pieces(documents, length)):
            raise ValueError(
                f"{where}: the batch was not cut over context-parallel ranks by the documents that the model is given. "
                "Hand the same cu_seqlens to upstream's get_batch_on_this_cp_rank and to the model, or give "
                "--context-parallel-layout sequence, with which a batch is cut as without documents."
            )

    def _choice(self, documents: Documents, length: int) -> LayoutChoice:
        lengths = self.lengths or (length,)
        if (documents, lengths) not in self._recent:
            choice = choose_layout(
                documents, self.types, lengths, kind=self.kind, window=self.window, sliding=self.sliding
            )
            self._recent[documents, lengths] = choice
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
            self._report(choice)
        return self._recent[documents, lengths]

    def _report(self, choice: LayoutChoice) -> None:
        if self._last_kind is None:
            self.say(choice.why)
        elif self._last_kind != choice.kind:
            log_single_rank(logger, logging.INFO, choice.why)
        self._last_kind = choice.kind
