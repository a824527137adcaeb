"""Plans of blocks compute each visible score once and no other; documents are read from masks."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron.longseq.attention.kernels.base import Scores
from megatron.longseq.attention.kernels.reference import visible_mask
from megatron.longseq.attention.plan.launches import Tile
from megatron.longseq.attention.plan.ranges import Documents, DocumentSpan, TokenRange
from megatron.longseq.attention.plan.tiles import Mask, plan_causal
from megatron.longseq.attention.runtime.packed_documents import document_starts, documents_from_starts
from tests.unit.attention_bed import seen


def packed(lengths: list[int]) -> tuple[DocumentSpan, ...]:
    """Return documents of the given lengths."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return tuple(DocumentSpan(end - length, end, end - length) for end, length in zip(ends, lengths, strict=True))


def dense(documents: Documents, window: int | None = None) -> Tensor:
    """Return the mask [b, 1, N, N] of documents, True where a key is seen."""
    masks = []
    for runs in documents.spans:
        mask = seen(runs[-1].end, window)
        for run in runs:
            mask[run.begin : run.end, : run.start] = False
        masks.append(mask)
    return torch.stack(masks)[:, None]


def counted(tiles: tuple[Tile, ...], queries: TokenRange, batch: int, keys: int) -> Tensor:
    """Return how often tiles compute each score, [b, 1, rows, keys]."""
    counts = torch.zeros(batch, 1, queries.size, keys, dtype=torch.int64)
    for tile in tiles:
        for block in tile.blocks:
            scores = Scores(1.0, block.causal, block.window)
            mask = visible_mask(tile.rows.size, block.keys.size, scores, torch.device("cpu"))
            counts[tile.batch.slice(), :, tile.rows.slice(), block.keys.slice()] += mask
    return counts


@st.composite
def problems(draw: st.DrawFn) -> tuple[Documents, TokenRange, int | None]:
    size = draw(st.integers(1, 40))
    sequences = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, size))) | {size})
        sequences.append(packed([b - a for a, b in zip([0, *cuts], cuts, strict=False)]))
    begin = draw(st.integers(0, size - 1))
    span = TokenRange(begin, draw(st.integers(begin + 1, size)))
    return Documents(tuple(sequences)), span, draw(st.none() | st.integers(0, size + 1))


@given(problems(), st.booleans())
def test_each_visible_score_is_computed_once(
    problem: tuple[Documents, TokenRange, int | None], rectangular: bool
) -> None:
    documents, span, window = problem
    size, batch = documents.spans[0][-1].end, len(documents.spans)
    tiles = plan_causal(span, Mask(batch, window, documents), rectangular=rectangular)
    assert torch.equal(counted(tiles, span, batch, size), dense(documents, window)[:, :, span.slice()].long())
    for tile in tiles:
        first = tile.blocks[0]
        assert first.causal and first.keys.end == span.begin + tile.rows.end, "the first block holds the rows' own keys"


def test_windows_are_cut_into_strips() -> None:
    tiles = plan_causal(TokenRange(4096, 8192), Mask(1, 1000), rectangular=False)
    area = sum(tile.rows.size * block.keys.size for tile in tiles for block in tile.blocks)
    assert area < 1.6 * 4096 * 1000
    assert torch.equal(
        counted(plan_causal(TokenRange(700, 2000), Mask(1, 300), rectangular=False), TokenRange(700, 2000), 1, 2000)[
            0, 0
        ],
        seen(2000, 300)[700:].long(),
    )


def test_blocks_outside_documents_are_not_computed() -> None:
    documents = Documents((packed([100, 28, 128]),))
    tiles = plan_causal(TokenRange(128, 256), Mask(1, None, documents), rectangular=False)
    assert [(t.rows, [b.keys for b in t.blocks]) for t in tiles] == [(TokenRange(0, 128), [TokenRange(128, 256)])]
    same = Documents((packed([256]),) * 3)
    assert plan_causal(TokenRange(64, 128), Mask(3, None, same), rectangular=True) == plan_causal(
        TokenRange(64, 128), Mask(3), rectangular=True
    )


@pytest.mark.parametrize("lengths", [[[12]], [[5, 4, 3], [12]], [[1] * 12, [1, 11]], [[11, 1], [6, 6], [6, 6]]])
@pytest.mark.parametrize("rows", [TokenRange(0, 12), TokenRange(0, 5), TokenRange(5, 12), TokenRange(11, 12)])
def test_documents_from_a_mask(lengths: list[list[int]], rows: TokenRange) -> None:
    documents = Documents(tuple(packed(each) for each in lengths))
    mask = ~dense(documents)
    starts = document_starts(mask[:, :, rows.slice()], rows.begin)
    found = documents_from_starts(starts, rows.begin)
    assert [found.within(i, rows) for i in range(len(lengths))] == [
        documents.within(i, rows) for i in range(len(lengths))
    ]
    if rows.size == 12:
        assert found == documents
    for position, start in enumerate(starts[0].tolist(), rows.begin):
        assert max(run.start for run in documents.spans[0] if run.start <= position) == start


@pytest.mark.parametrize(
    ("row", "key", "hide"),
    [(5, 7, False), (5, 5, True), (9, 4, False), (9, 8, True), (3, 0, True), (0, 0, True)],
    ids=["future", "itself", "other document", "hole", "overlap", "nothing"],
)
def test_other_masks_are_refused(row: int, key: int, hide: bool) -> None:
    mask = ~dense(Documents((packed([12]), packed([6, 6]))))
    mask[1, 0, row, key] = hide
    with pytest.raises(ValueError, match=f"sequence 1, position {row} "):
        document_starts(mask)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no queries"):
        plan_causal(TokenRange(4, 4), Mask(1), rectangular=True)
    with pytest.raises(ValueError, match="window of -1"):
        plan_causal(TokenRange(0, 4), Mask(1, -1), rectangular=True)
    documents = Documents((packed([4]),))
    with pytest.raises(ValueError, match="1 lists of documents for a batch of 2"):
        plan_causal(TokenRange(0, 4), Mask(2, None, documents), rectangular=True)
    with pytest.raises(ValueError, match="attention covers positions 0 to 5"):
        plan_causal(TokenRange(0, 5), Mask(1, None, documents), rectangular=True)
    with pytest.raises(ValueError, match=re.escape("(4, 6, 3) (begin, end, start) does not continue (0, 4, 0)")):
        Documents(((DocumentSpan(0, 4, 0), DocumentSpan(4, 6, 3)),))
    with pytest.raises(ValueError, match=re.escape("expected bool [b, 1, rows, keys]")):
        document_starts(torch.zeros(2, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="rows 2 to 6, but keys only up to 4"):
        document_starts(torch.zeros(1, 1, 4, 4, dtype=torch.bool), 2)
