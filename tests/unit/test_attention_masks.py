"""Documents are read from distributed rows of masks once per micro-batch, and invalid masks are refused."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime.packed_documents import MaskReader, document_starts, gather_document_starts
from tests.unit.context_bed import ThreadCollectives, Wire, on_all
from tests.unit.test_attention_blocks import dense, packed

PACKED = Documents((packed([10, 1, 53]), packed([64]), packed([16, 16, 32])))


def exchanges(ranks: int) -> list[ThreadCollectives]:
    wires: dict[str, Wire] = defaultdict(Wire)
    return [ThreadCollectives(wires["all"], rank, ranks) for rank in range(ranks)]


def rows(mask: Tensor, layout: Layout, rank: int) -> Tensor:
    """Return a rank's rows, sharded segment by segment as upstream shards the batch."""
    spans = [span for segment in range(len(layout.lengths)) for span in layout.positions(rank, segment)]
    return torch.cat([mask[:, :, span.slice()] for span in spans], dim=2)


def hidden(documents: Documents) -> Tensor:
    """Return upstream's mask of whole sequences, True where a key is hidden."""
    return ~dense(documents)


def on_ranks(layout: Layout, job: Callable[[int, ThreadCollectives], Any]) -> list[Any]:
    channels = exchanges(layout.mesh.size)
    return on_all([lambda rank=rank: job(rank, channels[rank]) for rank in range(layout.mesh.size)])


@pytest.mark.parametrize("lengths", [(64,), (32, 16, 16)], ids=str)
@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_every_rank_learns_where_every_document_starts(mesh: tuple[int, int], lengths: tuple[int, ...]) -> None:
    layout, mask = Layout(Mesh(*mesh), lengths), hidden(PACKED)
    starts = torch.stack([torch.cat([torch.full((r.end - r.begin,), r.start) for r in runs]) for runs in PACKED.spans])
    for found in on_ranks(
        layout, lambda rank, way: gather_document_starts(rows(mask, layout, rank), layout, rank, way)
    ):
        assert found.dtype == torch.int32 and torch.equal(found, starts.int())


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1)], ids=str)
def test_a_mask_without_batch_and_heads_is_that_of_all_sequences(mesh: tuple[int, int]) -> None:
    """Upstream's local attention broadcasts it over its scores."""
    layout, mask = Layout(Mesh(*mesh), (64,)), hidden(Documents((packed([10, 1, 53]),)))
    expected = document_starts(mask)
    for whole in (mask[0], mask[0, 0]):
        assert torch.equal(document_starts(whole), expected)

        def job(rank: int, way: ThreadCollectives, dims: int = whole.dim()) -> Tensor:
            own = rows(mask, layout, rank)
            return gather_document_starts(own.view(own.shape[-dims:]), layout, rank, way)

        assert all(torch.equal(found, expected.int()) for found in on_ranks(layout, job))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (
            torch.zeros(1, 1, 16, 60, dtype=torch.bool),
            "context-parallel rank 2 of 4: the attention mask has shape (1, 1, 16, 60)",
        ),
        (torch.zeros(1, 1, 64, 64, dtype=torch.bool), "but a sequence of 64 tokens needs [b, 1, 16, 64]"),
        (torch.zeros(16, 60, dtype=torch.bool), "the attention mask has shape (1, 1, 16, 60)"),
        (torch.zeros(2, 16, 64, dtype=torch.bool), "the attention mask has shape (2, 16, 64)"),
    ],
)
def test_masks_of_other_shapes_are_refused(mask: Tensor, words: str) -> None:
    layout = Layout(Mesh(2, 2), (64,))
    with pytest.raises(ValueError, match=re.escape(words)):
        gather_document_starts(mask, layout, 2, exchanges(4)[2])


def test_a_wrong_row_of_one_rank_is_an_error_of_all() -> None:
    """If one rank alone raised an error, the others would wait in the collective."""
    layout, mask = Layout(Mesh(2, 2), (64,)), hidden(PACKED)
    mask[1, 0, 20, 3] ^= True

    def job(rank: int, way: ThreadCollectives) -> None:
        with pytest.raises(ValueError, match="not causal within packed documents: sequence 1, position 20; a position"):
            gather_document_starts(rows(mask, layout, rank), layout, rank, way)

    on_ranks(layout, job)


OTHER = Documents((packed([40, 24]),) * 3)
PLAIN = Documents((packed([64]),) * 3)


def read(masks: Callable[[MaskReader], Iterator[Tensor | None]], **flags: Any) -> list[tuple[list[Any], int]]:
    """Return, per rank of four, the documents that three layers get for each mask, and how often masks were read.

    Args:
        masks: given a reader, masks of whole sequences, one after the other.
        flags: of the reader.
    """
    layout = Layout(Mesh(2, 2), (64,))

    def job(rank: int, way: ThreadCollectives) -> tuple[list[Any], int]:
        reader, found = MaskReader(way, rank, **flags), []
        mine = torch.empty(0)
        for mask in masks(reader):
            own = None if mask is None else rows(mask, layout, rank)
            if own is not None and own.shape == mine.shape:
                mine.data.copy_(own)  # the same tensor again, changed behind autograd's back
            elif own is not None:
                mine = own
            per_layer = [reader.documents(None if mask is None else mine, layout, 3, layer) for layer in range(3)]
            assert per_layer[0] == per_layer[1] == per_layer[2]
            found.append(per_layer[0])
        return found, way.sent.messages

    return on_ranks(layout, job)


def test_every_mask_is_read_once_for_all_layers() -> None:
    """This includes a mask after None, and one that is changed in place and passed again."""

    def masks(_: MaskReader) -> Iterator[Tensor | None]:
        yield from (hidden(PLAIN), None, hidden(PACKED), hidden(OTHER), None, hidden(PLAIN), hidden(PACKED))

    for found, sent in read(masks):
        assert found == [None, None, PACKED, OTHER, None, None, PACKED]
        assert sent == 5


def test_a_changed_mask_is_read_again_for_a_layer_that_has_not_seen_it() -> None:
    """With virtual stages, the layers of the next chunk get the same tensor, changed in place."""
    layout = Layout(Mesh(1, 1), (64,))

    def job(rank: int, way: ThreadCollectives) -> None:
        reader, mask = MaskReader(way, rank), hidden(PACKED)
        assert reader.documents(mask, layout, 3, "chunk 0") == PACKED
        assert reader.documents(mask, layout, 3, "another layer of chunk 0") == PACKED
        mask.copy_(hidden(OTHER))
        assert reader.documents(mask, layout, 3, "chunk 1") == OTHER

    on_ranks(layout, job)


def test_a_mask_of_one_sequence_is_that_of_all() -> None:
    layout = Layout(Mesh(1, 2), (64,))
    one = Documents((packed([10, 54]),))

    def job(rank: int, way: ThreadCollectives) -> None:
        reader, mask = MaskReader(way, rank), rows(hidden(one), layout, rank)
        assert reader.documents(mask, layout, 2, 0) == Documents(one.spans * 2)
        with pytest.raises(ValueError, match="the attention mask has 3 sequences, but the micro-batch has 2"):
            reader.documents(rows(hidden(PACKED), layout, rank), layout, 2, 0)

    on_ranks(layout, job)


def test_documents_that_other_stages_do_not_hear_of_and_a_missing_mask_are_refused() -> None:
    layout = Layout(Mesh(1, 2), (64,))

    def job(rank: int, way: ThreadCollectives) -> None:
        reader = MaskReader(way, rank, stages=4)
        assert reader.documents(rows(hidden(PLAIN), layout, rank), layout, 3, 0) is None
        with pytest.raises(ValueError, match=r"with 4 pipeline stages .* between the first and the last get no batch"):
            reader.documents(rows(hidden(PACKED), layout, rank), layout, 3, 0)
        with pytest.raises(ValueError, match="--reset-attention-mask: the script passes neither"):
            MaskReader(way, rank, needs_mask=True).documents(None, layout, 3, 0)

    on_ranks(layout, job)
