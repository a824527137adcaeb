"""Ranks hold upstream's chunks before the all-to-all and the ring's zigzag after it."""

import re
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.attention.plan.heads import Heads, check_heads, choose_mesh, legal_meshes, mesh_flags
from megatron.longseq.attention.plan.layout import Layout, Mesh, length_multiple
from megatron.longseq.attention.plan.ranges import (
    TokenRange,
    TokenRanges,
    difference,
    intersection,
    rows_of,
    size,
    union,
)

MESHES = [Mesh(ulysses, ring) for ulysses, ring in product(range(1, 9), repeat=2)]


def numbers(spans: TokenRanges) -> list[int]:
    """Return the members of spans, in their order."""
    return [number for span in spans for number in range(span.begin, span.end)]


def sorted_apart(spans: TokenRanges) -> bool:
    """Return whether spans ascend and neither touch nor overlap."""
    return all(a.end < b.begin for a, b in pairwise(spans)) and all(span.size > 0 for span in spans)


def cuts(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Return the lengths of the pieces of a length."""
    ends = st.sets(st.integers(1, length)).map(lambda inside: sorted({0, length, *inside}))
    return ends.map(lambda edges: tuple(b - a for a, b in pairwise(edges)))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    mesh = Mesh(
        draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.sampled_from(["head-first", "context-first"]))
    )
    tensor = draw(st.sampled_from([1, 2, 3, 4]))
    multiple = length_multiple(mesh.size, tensor)
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    pieces = tuple(draw(cuts(length * multiple // (2 * mesh.size))) for length in lengths) if mesh.size > 1 else None
    if pieces is not None:
        pieces = tuple(tuple(2 * mesh.size * piece for piece in each) for each in pieces)
    return Layout(mesh, tuple(length * multiple for length in lengths), tensor, draw(st.sampled_from([None, pieces])))


def held_positions(layout: Layout, segments: range) -> list[list[int]]:
    """Return the positions of every rank before the all-to-all."""
    ranks = range(layout.mesh.size)
    return [[n for segment in segments for n in numbers(layout.positions(rank, segment))] for rank in ranks]


def delivered(layout: Layout, ring: int, segments: range) -> list[int]:
    """Return the positions that the all-to-all of a Ulysses group brings, unpacked."""
    sent = held_positions(layout, segments)[ring * layout.mesh.ulysses : (ring + 1) * layout.mesh.ulysses]
    return [n for arrival in layout.received_rows(segments) for n in sent[arrival.source][arrival.rows.slice()]]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.ulysses}x{mesh.ring}")
def test_the_all_to_all_delivers_the_rings_zigzag(mesh: Mesh) -> None:
    layout = Layout(mesh, (4 * mesh.size, 6 * mesh.size, 2 * mesh.size))
    for segment, begin in enumerate((0, 4 * mesh.size, 10 * mesh.size)):
        chunks = torch.arange(begin, begin + layout.lengths[segment]).view(2 * mesh.ring, -1)
        for ring in range(mesh.ring):
            zigzag = torch.cat([chunks[ring], chunks[2 * mesh.ring - 1 - ring]]).tolist()
            assert delivered(layout, ring, range(segment, segment + 1)) == zigzag
            assert numbers(layout.ring_positions(ring, segment)) == zigzag


@pytest.mark.parametrize("mesh", MESHES[::5], ids=lambda mesh: f"{mesh.ulysses}x{mesh.ring}")
def test_one_segments_arrivals_are_a_view_and_a_flip(mesh: Mesh) -> None:
    layout = Layout(mesh, (8 * mesh.size,))
    for ring in range(mesh.ring):
        ranks = range(ring * mesh.ulysses, (ring + 1) * mesh.ulysses)
        received = torch.tensor([numbers(layout.positions(rank, 0)) for rank in ranks]).view(mesh.ulysses, 2, -1)
        assert torch.cat([received[:, 0], received[:, 1].flip(0)]).flatten().tolist() == delivered(
            layout, ring, range(1)
        )


@given(layouts())
def test_every_token_has_one_rank_and_every_shard_ascends(layout: Layout) -> None:
    everything = list(range(sum(layout.lengths)))
    segments = range(len(layout.lengths))
    assert sorted(n for rank in held_positions(layout, segments) for n in rank) == everything
    assert all(len(rank) == sum(layout.tokens(s) for s in segments) for rank in held_positions(layout, segments))
    assert all(layout.tokens(segment) % layout.tensor == 0 for segment in segments)
    shards = [layout.shard(ring, segments) for ring in range(layout.mesh.ring)]
    assert sorted(n for shard in shards for n in numbers(shard)) == everything
    assert all(sorted_apart(shard) for shard in shards)
    for ring, shard in enumerate(shards):
        assert delivered(layout, ring, segments) == numbers(shard)
    for segment in segments:
        begin = layout.begin(segment)
        of_segment = sorted(n for rank in held_positions(layout, range(segment, segment + 1)) for n in rank)
        assert of_segment == list(range(begin, begin + layout.lengths[segment]))


@given(layouts())
def test_gathered_tokens_are_put_by_position(layout: Layout) -> None:
    segments = range(len(layout.lengths))
    shards = [numbers(shard) for shard in layout.shards(segments)]
    ordered = [n for arrival in layout.all_gather_order(segments) for n in shards[arrival.source][arrival.rows.slice()]]
    assert ordered == list(range(sum(layout.lengths)))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_data_is_laid_out_as_upstream_does(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.utils import get_batch_on_this_cp_rank

    layout = Layout(Mesh(1, size), (6 * size, 2 * size))
    tokens = torch.arange(8 * size)
    for rank in range(size):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        for segment, part in enumerate(tokens.split(layout.lengths)):
            batch = get_batch_on_this_cp_rank({"tokens": part[None]}, is_hybrid_cp=False)
            assert batch["tokens"][0].tolist() == numbers(layout.positions(rank, segment))


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.ulysses}x{mesh.ring}")
def test_groups_of_both_placements(mesh: Mesh) -> None:
    members = [3 + 4 * index for index in range(mesh.size)]  # tensor parallel 4 inside
    grid = torch.tensor(members)
    head_first = grid.view(mesh.ring, mesh.ulysses)
    assert mesh.ordered(members) == tuple(members)
    assert mesh.ulysses_groups(members) == list(map(tuple, head_first.tolist()))
    assert mesh.ring_groups(members) == list(map(tuple, head_first.T.tolist()))

    other = Mesh(mesh.ulysses, mesh.ring, "context-first")
    context_first = grid.view(mesh.ulysses, mesh.ring)
    ranks = other.ordered(members)
    assert other.ring_groups(ranks) == list(map(tuple, context_first.tolist()))
    assert other.ulysses_groups(ranks) == list(map(tuple, context_first.T.tolist()))
    for rank, member in enumerate(ranks):
        place = other.place(rank)
        assert other.ulysses_groups(ranks)[place.ring][place.ulysses] == member
        assert other.ring_groups(ranks)[place.ulysses][place.ring] == member


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mesh(0, 2), "mesh of 0 x 2 (Ulysses x ring) ranks: both must be at least 1"),
        (lambda: Mesh(2, 2, "tail-first"), "placement 'tail-first': give head-first or context-first"),
        (lambda: Mesh(2, 2).ordered([0, 1, 2]), "needs 4 global ranks in ascending order"),
        (lambda: Mesh(2, 2).ordered([0, 2, 1, 3]), "needs 4 global ranks in ascending order"),
        (lambda: Layout(Mesh(2, 2), (16, 12)), "segment 1 of 2 has 12 tokens"),
        (lambda: Layout(Mesh(2, 2), (16, 12)), "give a multiple of 8, for instance 16"),
        (lambda: Layout(Mesh(2, 1), (16, 4), tensor=4), "over 4 tensor-parallel ranks; give a multiple of 8"),
        (lambda: Layout(Mesh(2, 1), ()), "segment 0 of 0 has 0 tokens"),
        (
            lambda: Layout(Mesh(2, 1), (16, 8), pieces=((8, 4), (8,))),
            "pieces of [12, 8] tokens for segments of [16, 8]",
        ),
        (lambda: Layout(Mesh(2, 1), (16,), pieces=((10, 6),)), "a piece of 10 tokens"),
        (lambda: Layout(Mesh(2, 1), (8,)).positions(2, 0), "rank 2 is not in a group of 2; give 0 to 1"),
        (lambda: Heads(8, 3), "8 query heads are not a multiple of 3 key-value heads"),
        (lambda: Heads.of(8, 2, tensor=3), "8 heads in 2 query groups cannot be divided among 3"),
        (lambda: choose_mesh(0, 8, 8, 8), "each must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()  # type: ignore[operator]


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8))
def test_legal_degrees_are_those_with_whole_heads_that_belong_together(size: int, kv: int, per_kv: int) -> None:
    heads = Heads(kv * per_kv, kv)

    def fits(ulysses: int) -> bool:
        """Return whether heads divide: equal shares of query heads, each on equally many whole key heads."""
        if heads.query % ulysses:
            return False
        share = heads.query // ulysses
        used = [{head // per_kv for head in range(u * share, (u + 1) * share)} for u in range(ulysses)]
        whole = all(len(heads_used) * per_kv == share for heads_used in used)
        return whole or all(len(heads_used) == 1 for heads_used in used)

    legal = dict(legal_meshes(size, heads))
    assert legal == {degree: size // degree for degree in range(1, size + 1) if size % degree == 0 and fits(degree)}
    for degree in legal:
        shared = heads.per_rank(degree)
        received = [0] * kv
        for index in range(degree):
            query = range(index * heads.query // degree, (index + 1) * heads.query // degree)
            first = index * kv // degree
            keys = range(first, first + shared.kv)
            assert {head // per_kv for head in query} == set(keys) and len(query) == shared.query
            for head in keys:
                received[head] += 1
        assert received == [max(kv, degree) // kv] * kv
        assert heads.sent(degree) == degree * (shared.query + 2 * shared.kv)


def test_an_illegal_degree_is_refused_with_the_legal_ones() -> None:
    check_heads(Mesh(4, 2), Heads(8, 2))
    with pytest.raises(
        ValueError, match=r"8 query heads cannot be shared by 3 .* Possible degrees: .*--cp-comm-type p2p$"
    ):
        check_heads(Mesh(3, 1), Heads(8, 2))
    with pytest.raises(ValueError, match="4 does not divide the 6 key-value heads") as error:
        check_heads(Mesh(4, 1), Heads(12, 6))
    assert "--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("size", "heads", "groups", "node", "tensor", "mesh"),
    [
        (16, 32, 8, 8, 1, (8, 2)),  # inside a node, the ring across two
        (16, 32, 8, 8, 2, (4, 4)),  # tensor parallel takes a half of the node
        (16, 32, 8, 8, 8, (1, 16)),  # the node is full
        (4, 32, 8, 8, 1, (4, 1)),
        (4, 12, 6, 8, 1, (2, 2)),  # heads stop it
        (8, 32, None, 8, 1, (8, 1)),
        (6, 12, 12, 8, 1, (2, 3)),  # 3 and 6 would straddle nodes
        (3, 7, 7, 8, 1, (1, 3)),
        (8, 32, 2, 8, 4, (2, 4)),  # fewer groups than tensor-parallel ranks
    ],
)
def test_the_degree_that_is_chosen(
    size: int, heads: int, groups: int | None, node: int, tensor: int, mesh: tuple[int, int]
) -> None:
    assert choose_mesh(size, heads, groups, node, tensor) == Mesh(*mesh)


def test_a_mesh_is_flags() -> None:
    assert mesh_flags(Mesh(1, 4)) == "--context-parallel-size 4 --cp-comm-type p2p"
    assert mesh_flags(Mesh(4, 1)) == "--context-parallel-size 4 --cp-comm-type a2a"
    assert mesh_flags(Mesh(2, 2, "context-first")) == (
        "--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2 "
        "--context-parallel-placement context-first"
    )


@given(*[st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4)] * 2)
def test_sets_of_numbers(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    a, b = (union(TokenRange(*pair) for pair in pairs) for pairs in (left, right))
    plain_a, plain_b = ({n for pair in pairs for n in range(*pair)} for pairs in (left, right))
    assert set(numbers(a)) == plain_a and size(a) == len(plain_a) and sorted_apart(a)
    assert numbers(intersection(a, b)) == sorted(plain_a & plain_b)
    assert numbers(difference(a, b)) == sorted(plain_a - plain_b)
    both = union([*a, *b])
    assert [numbers(both)[n] for n in numbers(rows_of(both, a))] == numbers(a)
    if plain_b - plain_a:
        with pytest.raises(ValueError, match="holds positions"):
            rows_of(a, b)
