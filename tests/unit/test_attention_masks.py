"""Documents read from rows of masks that are spread over ranks: once a micro-batch, and wrong masks refused."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.longseq.attention.blocks import Documents
from megatron.longseq.attention.layout import Layout, Mesh
from megatron.longseq.attention.masks import MaskReader, whole_starts
from tests.unit.context_bed import ThreadExchange, Wire, on_all
from tests.unit.test_attention_blocks import dense, packed

PACKED = Documents((packed([10, 1, 53]), packed([64]), packed([16, 16, 32])))


def exchanges(ranks: int) -> list[ThreadExchange]:
    wires: dict[str, Wire] = defaultdict(Wire)
    return [ThreadExchange(wires["all"], rank, ranks) for rank in range(ranks)]


def rows(mask: Tensor, layout: Layout, rank: int) -> Tensor:
    """A rank's rows, cut as upstream cuts the batch: segment by segment."""
    spans = [span for segment in range(len(layout.lengths)) for span in layout.positions(rank, segment)]
    return torch.cat([mask[:, :, span.slice()] for span in spans], dim=2)


def hidden(documents: Documents) -> Tensor:
    """Upstream's mask of whole sequences: True where a key is hidden."""
    return ~dense(documents)


def on_ranks(layout: Layout, job: Callable[[int, ThreadExchange], Any]) -> list[Any]:
    channels = exchanges(layout.mesh.size)
    return on_all([lambda rank=rank: job(rank, channels[rank]) for rank in range(layout.mesh.size)])


@pytest.mark.parametrize("lengths", [(64,), (32, 16, 16)], ids=str)
@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_every_rank_learns_where_every_document_starts(mesh: tuple[int, int], lengths: tuple[int, ...]) -> None:
    layout, mask = Layout(Mesh(*mesh), lengths), hidden(PACKED)
    starts = torch.stack([torch.cat([torch.full((r.end - r.begin,), r.start) for r in runs]) for runs in PACKED.runs])
    for found in on_ranks(layout, lambda rank, way: whole_starts(rows(mask, layout, rank), layout, rank, way)):
        assert found.dtype == torch.int32 and torch.equal(found, starts.int())


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (
            torch.zeros(1, 1, 16, 60, dtype=torch.bool),
            "context-parallel rank 2 of 4: an attention mask of (1, 1, 16, 60)",
        ),
        (torch.zeros(1, 1, 64, 64, dtype=torch.bool), "for a sequence of 64 tokens; expected [b, 1, 16, 64]"),
        (torch.zeros(16, 64, dtype=torch.bool), "an attention mask of (16, 64)"),
        (
            torch.zeros(1, 1, 16, 64, dtype=torch.bool),
            "not causal within packed documents: sequence 0, position 16 sees",
        ),
    ],
)
def test_masks_of_other_shapes_or_kinds_are_refused(mask: Tensor, words: str) -> None:
    layout = Layout(Mesh(2, 2), (64,))
    with pytest.raises(ValueError, match=re.escape(words)):
        whole_starts(mask, layout, 2, exchanges(4)[2])


def test_a_micro_batchs_mask_is_read_once_for_all_layers() -> None:
    layout = Layout(Mesh(2, 2), (64,))
    other = Documents((packed([64]),) * 3)

    def job(rank: int, way: ThreadExchange) -> tuple[list[Documents | None], list[int]]:
        reader, found, sent = MaskReader(way, rank, packs_documents=True), [], []
        for documents in (PACKED, other, PACKED):
            mask = rows(hidden(documents), layout, rank)
            for _layer in range(3):
                found.append(reader.documents(mask, layout))
                sent.append(way.sent.messages)
        return found, sent

    for found, sent in on_ranks(layout, job):
        assert found == [PACKED] * 3 + [other] * 3 + [PACKED] * 3
        assert sent == [1] * 3 + [2] * 3 + [3] * 3


def test_a_plain_mask_is_looked_at_once_in_a_run() -> None:
    layout = Layout(Mesh(1, 2), (64,))
    plain = hidden(Documents((packed([64]),)))

    def job(rank: int, way: ThreadExchange) -> int:
        reader = MaskReader(way, rank, packs_documents=False)
        for _ in range(3):
            assert reader.documents(rows(plain, layout, rank), layout) is None
        assert reader.documents(None, layout) is None
        return way.sent.messages

    assert on_ranks(layout, job) == [1, 1]


def test_documents_without_the_flag_and_the_flag_without_a_mask_are_refused() -> None:
    layout = Layout(Mesh(1, 2), (64,))

    def job(rank: int, way: ThreadExchange) -> None:
        with pytest.raises(ValueError, match="separates documents, but --reset-attention-mask is not given; give it"):
            MaskReader(way, rank, packs_documents=False).documents(rows(hidden(PACKED), layout, rank), layout)
        with pytest.raises(ValueError, match="--reset-attention-mask is given, but this stage has no attention mask"):
            MaskReader(way, rank, packs_documents=True).documents(None, layout)

    on_ranks(layout, job)
