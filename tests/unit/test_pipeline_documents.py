"""Segments cut by packed documents: work counted token by token, multiples, and what ranks agree on before a step."""

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.pipeline.plan.document_partition import DocumentCut, cut_by_documents, describe_cuts
from megatron.longseq.pipeline.plan.partition import TOLERATED, balanced
from megatron.longseq.pipeline.plan.segment_cost import Coefficients, CostModel, Line, ModelShape, flops
from megatron.longseq.pipeline.runtime.document_cuts import DocumentCuts
from tests.unit.test_attention_blocks import packed

LLAMA = {"ffn_hidden_size": 14336, "num_query_groups": 8, "swiglu": True, "padded_vocab_size": 128256}


def work_by_token(model: CostModel, documents: Documents, lengths: tuple[int, ...]) -> list[float]:
    """Count the work of every segment, token by token."""
    shape, layer, head = model.shape, model.layer, model.head
    cell = layer.forward.cell + layer.backward.cell
    token = shape.num_layers * (layer.forward.token + layer.backward.token) + head.forward.token + head.backward.token
    found, begin = [], 0
    for length in lengths:
        work = 0.0
        for spans in documents.spans:
            for position in range(begin, begin + length):
                before = position - max(span.start for span in spans if span.begin <= position)
                for window, layers in shape.windows().items():
                    work += layers * cell * (1 + (before if window is None else min(before, window)))
                work += token
        found.append(work)
        begin += length
    return found


def over_mean(work: list[float]) -> float:
    return max(work) * len(work) / sum(work)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_cut_is_nearly_the_best_one_counted_token_by_token(data: st.DataObject) -> None:
    multiple, segments = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(2, 3))
    total = multiple * data.draw(st.integers(segments, 16))
    sequences = []
    for _ in range(data.draw(st.integers(1, 2))):
        ends = data.draw(st.sets(st.integers(1, total - 1), max_size=6))
        sequences.append(packed([b - a for a, b in pairwise([0, *sorted(ends), total])]))
    documents = Documents(tuple(sequences))
    window = data.draw(st.sampled_from([None, 0, 3]))
    shape = ModelShape(2, 8, 2, total, window=window, windowed=() if window is None else (True, False))
    line = Line(data.draw(st.sampled_from([0.0, 1.0, 5.0])), data.draw(st.sampled_from([1.0, 7.0])))
    model = CostModel(shape, Coefficients(line, line, line), Coefficients(Line(token=2), Line(token=3), Line()))
    known = balanced(model, segments, multiple=multiple).lengths
    cut = cut_by_documents(model, known, documents, multiple=multiple)
    assert cut.sequence == pytest.approx(over_mean(work_by_token(model, documents, known)))
    assert sum(cut.lengths) == total and all(length > 0 and length % multiple == 0 for length in cut.lengths)
    if cut.kind == "sequence":
        assert cut.lengths == known and cut.documents * 1.01 >= cut.sequence
    else:
        assert cut.documents == pytest.approx(over_mean(work_by_token(model, documents, cut.lengths)))
        assert cut.documents < cut.sequence
    places = [multiple * index for index in range(1, total // multiple)]
    every = [tuple(b - a for a, b in pairwise([0, *one, total])) for one in combinations(places, segments - 1)]
    best = min(over_mean(work_by_token(model, documents, lengths)) for lengths in every)
    # A cut that is rounded to a multiple moves at most the work of that many tokens from one segment to the next.
    dearest = max(work_by_token(model, documents, (multiple,) * (total // multiple)))
    mean = sum(work_by_token(model, documents, (total,))) / segments
    assert cut.documents <= best + dearest / mean + 1e-9


@pytest.mark.parametrize(
    ("lengths", "kind"),
    [
        ([131072], "sequence"),
        ([98304, *[512] * 64], "documents"),
        ([*[512] * 64, 98304], "documents"),
        ([512] * 256, "documents"),
    ],
)
def test_a_model_at_128k_is_cut_by_its_documents_within_one_percent(lengths: list[int], kind: str) -> None:
    model = flops(ModelShape(32, 4096, 32, 131072, **LLAMA))
    by_sequence = balanced(model, 4, multiple=16).lengths
    cut = cut_by_documents(model, by_sequence, Documents((packed(lengths),)), multiple=16)
    assert cut.kind == kind and (cut.lengths == by_sequence) == (kind == "sequence")
    # Both partitions take the coarsest alignment within 1% of the mean. Of 131,072 tokens, 16 are never 1% of it.
    assert (cut.documents if kind == "documents" else cut.sequence) <= TOLERATED
    assert kind == "sequence" or cut.sequence > TOLERATED * cut.documents
    line = describe_cuts([cut, DocumentCut("sequence", by_sequence, 1.0, 1.0)])
    taken = int(kind == "documents")
    assert line.startswith(f"segments of packed documents: {taken} of 2 micro-batches cut by documents")


class _Group:
    """Collectives of this rank and others whose tensors are known."""

    def __init__(self, *others: list[list[int]]) -> None:
        self.others = others

    def all_gather(self, own: torch.Tensor) -> torch.Tensor:
        return torch.stack([own, *(torch.tensor(one) for one in self.others)])


def halves(documents: Documents) -> DocumentCut:
    first = documents.spans[0][0].end
    return DocumentCut("documents", (first, 8 - first), 2.0, 1.0)


def sample(*rows: list[int]) -> dict[str, Any]:
    return {"cu_seqlens": torch.tensor([[*row, *[8] * (9 - len(row))] for row in rows], dtype=torch.int32)}


def of_step(samples: list[Any] | None, *groups: _Group) -> tuple[list[Any], tuple[tuple[int, ...], ...]]:
    cuts = DocumentCuts(halves, 2, 8, groups)  # type: ignore[arg-type]
    (data, *_), lengths = cuts.of_step([None if samples is None else iter(samples)], 2)
    return ([] if data is None else list(data)), lengths


def test_the_samples_of_a_step_are_read_ahead_and_all_ranks_take_the_same_cuts() -> None:
    samples = [sample([0, 3, 8]), sample([0, 5, 8], [0, 8]), "of the next step"]
    expected = ((3, 5), (5, 3))
    assert of_step(samples) == (samples, expected)
    same, nothing = [[3, 5], [5, 3]], [[0, 0], [0, 0]]
    assert of_step(samples, _Group(same, nothing), _Group(nothing)) == (samples, expected)
    assert of_step(None, _Group(nothing, same)) == ([], expected), "a rank that reads no data"
    assert of_step(None, _Group(nothing), _Group(same)) == ([], expected), "a stage that reads no data"
    joined = {"cu_seqlens": torch.tensor([0, 5, 8, 16]), "cu_seqlens_padded": torch.tensor([0, 6, 8, 16])}
    assert of_step([joined, samples[0]])[1] == ((6, 2), (3, 5)), "padding belongs to the document before it"


@pytest.mark.parametrize(
    ("samples", "groups", "words"),
    [
        ([sample([0, 3, 8]), {"tokens": torch.zeros(1)}], [], "samples of the data iterator have no cu_seqlens"),
        ([sample([0, 3, 8]), sample([0, 9, 8])], [], "cu_seqlens fall from 9 to 8"),
        ([sample([0, 3, 8])] * 2, [_Group([[3, 5], [5, 3]])], "those of other micro-batches"),
        ([sample([0, 3, 8])] * 2, [_Group([[-1, -1], [-1, -1]]), _Group()], "malformed ones"),
        ([sample([0, 3, 8])] * 2, [_Group(), _Group([[5, 3], [3, 5]])], "those of other micro-batches"),
        (None, [_Group([[0, 0], [0, 0]])], "no rank has read a sample"),
    ],
)
def test_ranks_that_cannot_agree_are_refused_before_the_step(samples: Any, groups: list[_Group], words: str) -> None:
    with pytest.raises(ValueError, match=f"--seq1f1b-partition documents, rank 0: .*{words}"):
        of_step(samples, *groups)
