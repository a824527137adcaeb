"""Documents of a micro-batch: from cumulative lengths, on every rank the same, and wherever a dense mask ends them."""

import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron.longseq.attention.plan.comm_type import CommType
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.packing import documents_of
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime.document_layouts import DocumentLayouts
from megatron.longseq.attention.runtime.packed_batch import PackedReader
from megatron.longseq.attention.runtime.packed_documents import document_starts, starts_of
from patches.engine.session import SESSION
from patches.packed.data import ending_at_eod, ending_before_padding
from patches.packed.model import with_documents
from patches.usp.batch import as_sequences
from tests.unit.context_bed import ThreadCollectives
from tests.unit.test_attention_blocks import packed
from tests.unit.test_attention_masks import on_ranks

EOD = 7
TWO = [0, 1, 3, 3, 16, 32, 32]  # of two sequences of 16 tokens; documents of no tokens are none
DOCUMENTS = Documents((packed([1, 2, 13]), packed([16])))


def params(borders: Any, **more: Any) -> PackedSeqParams:
    borders = torch.tensor(borders, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, **more)


def test_documents_are_those_of_the_borders() -> None:
    assert documents_of(TWO, 2, 16) == DOCUMENTS
    reader = PackedReader(1, 0)
    assert reader.documents(params(TWO), 2, 16) == reader.documents(params([TWO]), 2, 16) == DOCUMENTS
    padded = params([0, 1, 2, 2, 9, 25, 25])
    padded.cu_seqlens_q_padded = padded.cu_seqlens_kv_padded = params(TWO).cu_seqlens_q
    assert reader.documents(padded, 2, 16) == DOCUMENTS  # padding is the end of the document that it follows


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([0], r"cu_seqlens \[0\]: cu_seqlens of one micro-batch begin with 0"),
        ([1, 32], r"cu_seqlens \[1, 32\]"),
        ([0, 20, 16, 32], "cu_seqlens fall from 20 to 16 at index 2"),
        ([0, 16, 30], "cu_seqlens end with 30, but the micro-batch has 32 tokens"),
        ([0, 16, 48], "cu_seqlens end with 48"),
        ([0, 8, 20, 32], "the document of tokens 8 to 20 lies in two sequences, of 16 tokens each"),
    ],
)
def test_malformed_borders_are_refused_on_every_rank(borders: list[int], message: str) -> None:
    def job(rank: int, way: ThreadCollectives) -> None:
        with pytest.raises(ValueError, match=f"rank {rank} of 2: .*{message}"):
            PackedReader(2, rank, way).documents(params(borders), 2, 16)

    on_ranks(Layout(Mesh(2, 1), (32,)), job)


def test_what_is_no_packed_batch_is_refused() -> None:
    reader, other, longer, fewer = PackedReader(1, 0, always=True), params(TWO), params(TWO), params([0, 16, 32])
    other.cu_seqlens_kv = other.cu_seqlens_q + 1
    longer.cu_seqlens_q_padded = params([0, 2, 3, 3, 16, 32, 32]).cu_seqlens_q  # the second of 1, but 2 tokens
    fewer.cu_seqlens_kv_padded = other.cu_seqlens_q
    for given_params, message in (
        (None, "the script hands the model no packed_seq_params"),
        (PackedSeqParams(qkv_format="thd"), "no cu_seqlens_q"),
        (PackedSeqParams(qkv_format="bshd"), "the format 'bshd'"),
        (other, "cu_seqlens_q and cu_seqlens_kv differ"),
        (PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0.0, 32.0])), r"is torch.float32 \(2,\)"),
        (PackedSeqParams(qkv_format="thd", cu_seqlens_q=[0, 32]), "cu_seqlens_q is a list"),
        (PackedSeqParams(qkv_format="thd", cu_seqlens_kv=torch.tensor([0, 32]).numpy()), "is a ndarray"),
        (longer, "cu_seqlens_q and cu_seqlens_q_padded do not belong together"),
        (fewer, "do not belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            reader.documents(given_params, 2, 16)


def test_a_core_attention_of_the_scripts_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would get tensors and documents of another form than upstream's."""

    class Own(torch.nn.Module):
        pass

    def forward(self, input_ids, labels=None, packed_seq_params=None, inference_context=None):  # type: ignore[no-untyped-def]
        return packed_seq_params

    monkeypatch.setitem(SESSION.state, "packed.model", PackedReader(1, 0))
    config = SimpleNamespace(
        multi_latent_attention=False, fused_single_qkv_rope=False, apply_rope_fusion=False, sequence_parallel=False
    )
    weight, tokens = torch.nn.Parameter(torch.ones(1)), torch.ones(2, 16, dtype=torch.int64)
    layer = SimpleNamespace(layer_number=3, self_attention=SimpleNamespace(core_attention=Own()))
    model = SimpleNamespace(config=config, pre_process=True, decoder=SimpleNamespace(layers=[layer]))
    model.parameters = lambda: iter([weight])
    call = with_documents(forward)
    with pytest.raises(ValueError, match=r"packed documents, layer 3: its core attention is .*Own"):
        call(model, tokens, packed_seq_params=params(TWO))
    layer.self_attention.core_attention = DotProductAttention.__new__(DotProductAttention)
    assert call(model, tokens, packed_seq_params=params(TWO)).documents == DOCUMENTS


@pytest.mark.parametrize("other", [[0, 2, 3, 3, 16, 32, 32], [0, 1, 3, 16, 32], None], ids=str)
def test_ranks_that_disagree_are_named_on_every_rank(other: list[int] | None) -> None:
    def job(rank: int, way: ThreadCollectives) -> None:
        own = None if rank == 2 and other is None else params(other if rank == 2 else TWO)
        with pytest.raises(ValueError, match=re.escape("agree: [[0, 1, 3], [2]]")):
            PackedReader(4, rank, way, always=True).documents(own, 2, 16)

    on_ranks(Layout(Mesh(4, 1), (32,)), job)


@pytest.mark.parametrize("lengths", [None, (8, 8), (4, 12)], ids=str)
def test_positions_are_those_of_the_ranks_tokens(lengths: tuple[int, ...] | None) -> None:
    starts = starts_of(DOCUMENTS)
    whole = torch.arange(16) - starts
    for rank in range(2):
        reader = PackedReader(2, rank, layouts=DocumentLayouts((CommType(Mesh(1, 2)),), lengths))
        for segment in range(len(lengths or (16,))):
            own_ranges = reader.layouts.layout(DOCUMENTS, 16).positions(rank, segment)
            expected = torch.cat([whole[:, one.slice()] for one in own_ranges], dim=1).T
            found = reader.packed(DOCUMENTS, 16, segment, torch.device("cpu"))
            assert found.positions is not None and found.length == 16 and found.documents == DOCUMENTS
            given_positions = found.positions if found.positions.dim() > 1 else found.positions[:, None].expand(-1, 2)
            assert torch.equal(given_positions, expected)
            frequencies = torch.arange(16.0)[:, None, None, None].expand(-1, 1, 1, 3)
            assert torch.equal(found.rotary(frequencies)[:, :, 0, 0].expand(-1, 2), expected.float())


LONG = Documents((packed([2, 40, 3, 83]),))


def test_data_and_model_have_one_layout() -> None:
    answers: list[str] = []
    for rank in range(4):
        layouts = DocumentLayouts((CommType(Mesh(1, 4)),), kind="document", say=answers.append)
        reader = PackedReader(4, rank, layouts=layouts)
        cut = layouts.cut(LONG, 128)
        assert cut.pieces is not None and len(cut.positions(rank, 0)) > 2
        reader.check_cut(LONG, 128, {"input_ids": torch.zeros(1, 32)})
        found = reader.packed(LONG, 128, 0, torch.device("cpu"))
        whole = torch.arange(128) - starts_of(LONG)[0]
        assert found.pieces == cut.pieces and found.positions is not None
        assert torch.equal(found.positions, torch.cat([whole[one.slice()] for one in cut.positions(rank, 0)]))
    assert len(answers) == 4 and answers[0].startswith("context-parallel layout of packed documents: by document")


def test_data_that_was_cut_otherwise_is_refused() -> None:
    tokens = {"labels": torch.zeros(1, 32)}
    by_document = PackedReader(4, 1, layouts=DocumentLayouts((CommType(Mesh(1, 4)),), kind="document"))
    with pytest.raises(ValueError, match=r"context-parallel rank 1 of 4: the batch was not cut .* by the documents"):
        by_document.check_cut(LONG, 128, tokens)
    by_document.check_cut(LONG, 128, {})  # stages in between are given no batch
    by_document.layouts.cut(Documents((packed([100, 28]),)), 128)
    with pytest.raises(ValueError, match="or give --context-parallel-layout sequence"):
        by_document.check_cut(LONG, 128, tokens)
    by_document.layouts.cut(Documents((packed([2, 39, 4, 83]),)), 128)  # has the same pieces
    by_document.check_cut(LONG, 128, tokens)
    by_sequence = PackedReader(4, 1, layouts=DocumentLayouts((CommType(Mesh(1, 4)),), kind="sequence"))
    by_sequence.check_cut(LONG, 128, tokens)


def test_whole_sequences_need_no_documents() -> None:
    reader = PackedReader(1, 0)
    found = reader.packed(documents_of([0, 16, 32], 2, 16), 16, 0, torch.device("cpu"))
    assert found.documents is None and found.positions is not None and found.positions.shape == (16,)


@given(st.lists(st.integers(5, EOD), min_size=1, max_size=40), st.booleans())
def test_documents_end_where_the_dense_mask_ends_them(tokens: list[int], resets: bool) -> None:
    data = torch.tensor(tokens)
    mask, _, positions = _get_ltor_masks_and_position_ids(data, EOD, resets, True, False, True)
    dataset = SimpleNamespace(config=SimpleNamespace(tokenizer=SimpleNamespace(eod=EOD), reset_position_ids=resets))
    get_item = ending_at_eod(lambda self, idx: {"tokens": data, "labels": data, "position_ids": None})
    sample = get_item(dataset, 0)
    assert torch.equal(sample["position_ids"], positions) and sample["cu_seqlens"].dtype == torch.int32
    assert sample["cu_seqlens"].shape == (len(tokens) + 1,)  # samples of one length stack
    documents = documents_of(sample["cu_seqlens"].tolist(), 1, len(tokens))
    assert torch.equal(starts_of(documents), document_starts(mask[None]).int())
    assert sample["max_seqlen"] == max(span.end - span.begin for span in documents.spans[0])


def test_sequences_that_upstream_joins_are_separated() -> None:
    tokens = torch.arange(32)[None]
    batch = {"tokens": tokens, "labels": None, "cu_seqlens": torch.tensor([[0, 3, 16, 32]]), "max_seqlen": None}
    separated = as_sequences(batch, 16)
    assert torch.equal(separated["tokens"], tokens.view(2, 16)) and separated["labels"] is None
    assert torch.equal(separated["cu_seqlens"], batch["cu_seqlens"])
    crossing = {**batch, "cu_seqlens": torch.tensor([[0, 3, 20, 32]])}
    assert as_sequences(crossing, 16) is crossing and as_sequences({"tokens": tokens}, 16)["tokens"] is tokens


@pytest.mark.parametrize(
    ("tokens", "valid", "before", "after"),
    [
        ([5, 6, 5, 6, 6, 0, 0, 0], [1, 3], [0, 2, 8], [0, 2, 5, 7, 8]),
        ([5, 6, 5, 0, 6, 0, 0, 0], [1, 5], [0, 2, 8], [0, 2, 6, 8]),  # a token that counts is no padding
        ([5, 6, 5, 6, 6, 5, 5, 5], [1, 3], [0, 2, 8], [0, 2, 8]),
        ([0, 0, 0, 0, 0, 0, 0, 0], [], [0, 8], [0, 8]),
    ],
)
def test_padding_at_the_end_is_no_conversation(
    monkeypatch: pytest.MonkeyPatch, tokens: list[int], valid: list[int], before: list[int], after: list[int]
) -> None:
    monkeypatch.setattr("patches.packed.data.PADDING", 2)
    mask = torch.zeros(8)
    mask[valid] = 1.0

    def original(self: Any, idx: int) -> dict[str, Any]:
        borders = torch.tensor([*before, *[8] * (9 - len(before))], dtype=torch.int32)
        return {"tokens": torch.tensor(tokens), "loss_mask": mask, "cu_seqlens": borders, "max_seqlen": idx}

    data_set = SimpleNamespace(config=SimpleNamespace(tokenizer=SimpleNamespace(pad=0)))
    found = ending_before_padding(original)(data_set, 6)
    assert found["cu_seqlens"].tolist() == [*after, *[8] * (9 - len(after))]
    assert found["cu_seqlens"].dtype is torch.int32
    assert int(found["max_seqlen"]) == (6 if after == before else max(b - a for a, b in pairwise(after)))
