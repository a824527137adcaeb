"""The choice of a layout for packed documents: costs by brute force, TransformerEngine's pieces, what is taken."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.longseq.attention.plan.comm_type import CommType
from megatron.longseq.attention.plan.layout import Layout, Mesh, Pieces
from megatron.longseq.attention.plan.layout_choice import (
    ROW_COST,
    STEP_COST,
    LayoutCost,
    LayoutKind,
    choose_layout,
    document_pieces,
)
from megatron.longseq.attention.plan.ranges import Documents
from tests.unit.test_attention_blocks import packed
from tests.unit.test_attention_layout import numbers

TOKENS = 1 << 14


def cost_by_token(
    documents: Documents,
    one: CommType,
    lengths: tuple[int, ...],
    pieces: Pieces | None,
    window: int,
    sliding: dict[int | None, int],
) -> LayoutCost:
    """Count every score and every received row, token by token."""
    layout, ring = Layout(one.mesh, lengths, pieces=pieces), one.mesh.ring
    starts = [{n: span.start for span in spans for n in range(span.begin, span.end)} for spans in documents.spans]
    cost, slowest, mean = 0, 0, 0.0
    for (reach, layers), segment in product(sliding.items(), range(len(lengths))):
        queries = [numbers(layout.ring_positions(rank, segment)) for rank in range(ring)]
        keys = [
            [n for s in range(segment + 1) for n in numbers(layout.ring_positions(rank, s))] for rank in range(ring)
        ]
        work = {}
        for rank in range(ring):
            for source in range(ring):
                seen = [
                    [
                        k
                        for q in queries[rank]
                        for k in keys[source]
                        if max(start[q], 0 if reach is None else q - reach) <= k <= q
                    ]
                    for start in starts
                ]
                rows = sum(len(set(one)) for one in seen) if source != rank else 0
                work[rank, source] = sum(map(len, seen)), rows
        if one.gathers:
            steps = [[[(rank, source) for source in range(ring)] for rank in range(ring)]]
        else:  # inside a window one rank further each step, then on to the next window
            steps = []
            for outer in range(ring // window):
                for inner in range(window):
                    at = lambda rank, outer=outer, inner=inner: (  # noqa: E731
                        (rank // window + outer) % (ring // window) * window + (rank + inner) % window
                    )
                    steps.append([[(rank, at(rank))] for rank in range(ring)])
        for step in steps:
            scores = [sum(work[pair][0] for pair in pairs) for pairs in step]
            rows = [sum(work[pair][1] for pair in pairs) for pairs in step]
            most = max(max(score, ROW_COST * row) for score, row in zip(scores, rows, strict=True))
            cost += layers * (most + (STEP_COST if most else 0))
            slowest, mean = slowest + layers * max(scores), mean + layers * sum(scores) / ring
    return LayoutCost(cost, slowest / mean)


@settings(max_examples=40)
@given(st.data())
def test_costs_are_those_counted_token_by_token(data: st.DataObject) -> None:
    ulysses, ring, window = data.draw(st.sampled_from([(1, 2, 2), (2, 2, 2), (1, 4, 4), (1, 4, 2), (1, 3, 3)]))
    one = CommType(Mesh(ulysses, ring), data.draw(st.booleans()))
    step = 2 * ulysses * ring
    lengths = tuple(step * count for count in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    sequences = []
    for _ in range(data.draw(st.integers(1, 2))):  # which may hold unlike documents
        ends = data.draw(st.sets(st.integers(1, sum(lengths) - 1), max_size=9))
        sequences.append(packed([b - a for a, b in pairwise([0, *sorted(ends), sum(lengths)])]))
    documents = Documents(tuple(sequences))
    sliding = data.draw(st.sampled_from([{None: 1}, {3: 2}, {None: 1, 0: 3}, {7: 1, 200: 1}]))
    choice = choose_layout(documents, [one], lengths, window=window, sliding=sliding)
    for pieces, cost in ((None, choice.sequence), (document_pieces(documents, lengths, step // 2), choice.document)):
        if cost is not None:
            expected = cost_by_token(documents, one, lengths, pieces, window, sliding)
            assert cost.cost == expected.cost and cost.imbalance == pytest.approx(expected.imbalance)
    assert (choice.document is None) == (document_pieces(documents, lengths, step // 2) is None)
    faster = choice.document is not None and choice.sequence is not None and choice.document.cost < choice.sequence.cost
    assert choice.kind == ("document" if faster else "sequence") and (choice.pieces is None) == (not faster)


@pytest.mark.parametrize("ranks", [2, 4])
def test_documents_padded_to_twice_the_ranks_lie_as_in_transformer_engine(ranks: int) -> None:
    """TransformerEngine divides each document into 2C chunks, of which rank c holds c and 2C - 1 - c."""
    lengths = [2 * ranks * count for count in (1, 5, 2, 1, 7)]
    documents, total = Documents((packed(lengths),)), sum(lengths)
    layout = Layout(Mesh(1, ranks), (total,), pieces=document_pieces(documents, (total,), ranks))
    for rank in range(ranks):
        expected = []
        for span in documents.spans[0]:
            chunk = (span.end - span.begin) // (2 * ranks)
            for number in (rank, 2 * ranks - 1 - rank):
                expected += range(span.begin + number * chunk, span.begin + (number + 1) * chunk)
        assert numbers(layout.positions(rank, 0)) == expected


@given(st.integers(1, 5), st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 3))
def test_pieces_end_where_documents_do_but_for_rounding(ranks: int, lengths: list[int], segments: int) -> None:
    step = 2 * ranks
    whole = -(-sum(lengths) // (step * segments)) * step
    total = whole * segments
    documents = Documents((packed([*lengths, total - sum(lengths)] if total > sum(lengths) else lengths),))
    pieces = document_pieces(documents, (whole,) * segments, ranks) or ((whole,),) * segments
    Layout(Mesh(1, ranks), (whole,) * segments, pieces=pieces)  # checks sums and multiples
    ends = {segment * whole + sum(each[: n + 1]) for segment, each in enumerate(pieces) for n in range(len(each))}
    borders = {-(-span.end // step) * step for span in documents.spans[0]}
    assert ends == borders | {whole * (segment + 1) for segment in range(segments)}


def taken(lengths: list[int], ranks: int, kind: LayoutKind = "auto") -> str:
    """Return the layout that is chosen for documents on a ring."""
    return choose_layout(Documents((packed(lengths),)), [CommType(Mesh(1, ranks))], (sum(lengths),), kind=kind).kind


def test_what_is_taken() -> None:
    short = [64] * 64
    assert taken([TOKENS], 8) == "sequence", "one document: both are the same"
    assert taken([3, 5, 8] * (TOKENS // 16), 8) == "sequence", "short documents need no other rank's keys"
    assert taken([3 * TOKENS, *short], 8) == "document", "the ranks with short documents would wait"
    assert taken([*short, 3 * TOKENS], 8) == "document"
    assert taken([3 * TOKENS, *short], 8, "sequence") == "sequence"
    assert taken([3, 5, 8] * (TOKENS // 16), 8, "document") == "document"


def test_the_sequences_of_a_micro_batch_are_cut_where_a_document_of_any_of_them_ends() -> None:
    long, ring = packed([3 * TOKENS, *[64] * 64]), CommType(Mesh(1, 8))
    lengths = (long[-1].end,)
    alone = choose_layout(Documents((long,)), [CommType(Mesh(8, 1))], lengths, kind="document")
    assert alone.kind == "sequence" and "no keys go round a ring" in alone.why
    other = packed([7, *[64] * 64, 3 * TOKENS - 7])
    unlike = choose_layout(Documents((long, other)), [ring], lengths)
    assert unlike.kind == "document" and unlike.document is not None and unlike.sequence is not None
    assert unlike.document.imbalance < unlike.sequence.imbalance
    both = choose_layout(Documents((long, long)), [CommType(Mesh(8, 1)), ring], lengths)
    assert both.kind == "document"
    assert both.why.startswith("context-parallel layout of packed documents: by document; work of the slowest rank")


def test_a_window_shares_the_work_of_a_long_document_evenly() -> None:
    """With all keys the zigzag of a sequence leaves ranks idle; within a short window every rank sees as many keys."""
    documents, ring = Documents((packed([3 * TOKENS, *[64] * 64]),)), [CommType(Mesh(1, 8))]
    lengths = (documents.spans[0][-1].end,)
    assert choose_layout(documents, ring, lengths).kind == "document"
    assert choose_layout(documents, ring, lengths, sliding={256: 4}).kind == "sequence"
