"""Check the ring's plan by brute force: each visible score once and no other, every message used, bytes exact."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron.longseq.attention.kernels.base import Scores
from megatron.longseq.attention.kernels.reference import visible_mask
from megatron.longseq.attention.plan.comm_volume import (
    LayerShape,
    Volume,
    all_to_all,
    paper_elements,
    peer_all_to_all,
    peer_ring,
    ring,
)
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.launches import Tile
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ranges import Documents, TokenRange, size
from megatron.longseq.attention.plan.ring_schedule import (
    Ring,
    RingStep,
    RingTransfers,
    plan_all_gather,
    plan_ring_attention,
    plan_transfers,
)
from megatron.longseq.attention.plan.tiles import Mask, plan_tiles
from tests.unit.context_run import all_gather
from tests.unit.test_attention_blocks import dense, packed
from tests.unit.test_attention_layout import numbers


@dataclass(frozen=True)
class Problem:
    """Attention of some segments, the last ones of a layout, on a ring."""

    ring: Ring
    layout: Layout
    segments: range
    mask: Mask

    @property
    def queries(self) -> tuple[tuple[TokenRange, ...], ...]:
        return self.layout.shards(self.segments)

    @property
    def keys(self) -> tuple[tuple[TokenRange, ...], ...]:
        return self.layout.shards(range(self.segments.stop))

    @property
    def traffic(self) -> RingTransfers:
        return plan_transfers(self.ring, self.queries, self.keys, self.mask)

    def steps(self, rank: int, rectangular: bool = True) -> tuple[RingStep, ...]:
        return plan_ring_attention(self.ring, self.queries, self.keys, self.mask, rank, rectangular=rectangular)

    def seen(self) -> Tensor:
        """Return the mask [b, positions, positions], True where a key is seen."""
        tokens = self.layout.begin(self.segments.stop)
        documents = self.mask.documents or Documents((packed([tokens]),) * self.mask.batch)
        return dense(documents, self.mask.window)[:, 0, :tokens, :tokens]


def causal(ring: Ring, *lengths: int, segment: int = 0) -> Problem:
    """Return plain causal attention of a segment."""
    return Problem(ring, Layout(Mesh(1, ring.size), lengths), range(segment, segment + 1), Mask(1))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    ranks = draw(st.integers(1, 8))
    inner = draw(st.sampled_from([width for width in range(1, ranks + 1) if ranks % width == 0]))
    lengths = tuple(2 * ranks * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3))))
    begin = draw(st.integers(0, len(lengths) - 1))
    segments = range(begin, draw(st.integers(begin + 1, len(lengths))))
    batch, tokens = draw(st.integers(1, 2)), sum(lengths)
    documents = None
    if draw(st.booleans()):
        cuts = [sorted(draw(st.sets(st.integers(1, tokens), max_size=5)) | {tokens}) for _ in range(batch)]
        sizes = [[b - a for a, b in zip([0, *ends], ends, strict=False)] for ends in cuts]
        documents = Documents(tuple(packed(lengths) for lengths in sizes))
    mask = Mask(batch, draw(st.none() | st.integers(0, tokens)), documents)
    return Problem(Ring(ranks, inner), Layout(Mesh(1, ranks), lengths), segments, mask)


def scores(tiles: tuple[Tile, ...], shape: tuple[int, int, int]) -> Tensor:
    """Return how often tiles compute each score, [b, rows, keys]."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for tile in tiles:
        for block in tile.blocks:
            at = visible_mask(
                tile.rows.size, block.keys.size, Scores(1.0, block.causal, block.window), torch.device("cpu")
            )
            assert at.any(1).all(), "a row that sees no key of a block"
            tall = tile.rows.size > block.keys.size + 1
            assert block.causal or block.window is None or not tall, "flash on a GPU would cut it on the right, too"
            counts[tile.batch.slice(), tile.rows.slice(), block.keys.slice()] += at
    return counts


@given(problems(), st.booleans())
def test_each_visible_score_is_computed_once_on_its_rank(problem: Problem, rectangular: bool) -> None:
    seen = problem.seen()
    for rank in range(problem.ring.size):
        rows = numbers(problem.queries[rank])
        total = torch.zeros(problem.mask.batch, len(rows), seen.shape[-1], dtype=torch.int64)
        for index, step in enumerate(problem.steps(rank, rectangular)):
            shape = (problem.mask.batch, len(rows), size(step.kv_rows))
            positions = numbers(problem.keys[step.source])
            here = [positions[row] for row in numbers(step.kv_rows)]
            assert step.kv_rows or not (step.first or step.more)
            total[:, :, here] += scores(step.first, shape) + scores(step.more, shape)
            starts = torch.zeros(shape[:2], dtype=torch.int64)
            for tile in step.first:
                starts[tile.batch.slice(), tile.rows.slice()] += 1
                assert all(block.causal for block in tile.blocks[:1])
            assert (starts == (index == 0)).all()
        assert torch.equal(total, seen[:, rows].long())


@given(problems())
def test_every_row_that_is_sent_is_there_in_time_and_used(problem: Problem) -> None:
    plans = [problem.steps(rank) for rank in range(problem.ring.size)]
    moves = problem.traffic.keys
    assert len({(move.sender, move.receiver, move.post) for move in moves}) == len(moves)
    for source in range(problem.ring.size):
        own = [move for move in moves if move.source == source]
        assert all(move.sender != move.receiver and move.rows and move.post < move.wait for move in own)
        rows_at = {source: (0, set(range(size(problem.keys[source]))))}  # rank: since which step, what
        for move in sorted(own, key=lambda move: move.wait):
            since, rows = rows_at[move.sender]
            assert since <= move.post and set(numbers(move.rows)) <= rows
            assert move.receiver not in rows_at, "one message brings a rank what it gets of a source"
            rows_at[move.receiver] = move.wait, set(numbers(move.rows))
        useful: dict[int, set[int]] = {}  # rows of the source that a rank computes with or hands on to use
        for rank in sorted(rows_at, key=lambda rank: -rows_at[rank][0]):
            index, step = next((i, step) for i, step in enumerate(plans[rank]) if step.source == source)
            assert index == rows_at[rank][0] and set(numbers(step.kv_rows)) == rows_at[rank][1]
            blocks = [block for tile in (*step.first, *step.more) for block in tile.blocks]
            rows = numbers(step.kv_rows)
            useful[rank] = {rows[key] for block in blocks for key in range(*block.keys)}
            for move in own:
                if move.sender == rank:
                    assert set(numbers(move.rows)) <= useful[move.receiver]
                    useful[rank] |= set(numbers(move.rows))


def computed(problem: Problem) -> Iterator[tuple[int, int, int, set[int]]]:
    """Return (step, rank, source, rows of the source's keys that get a gradient there)."""
    for rank in range(problem.ring.size):
        for index, step in enumerate(problem.steps(rank)):
            rows = numbers(step.kv_rows)
            blocks = [block for tile in (*step.first, *step.more) for block in tile.blocks]
            yield index, rank, step.source, {rows[key] for block in blocks for key in range(*block.keys)}


Sums = dict[tuple[int, int], dict[int, Counter[int]]]  # (rank, source): row of the source's keys: ranks that added


def add(sums: Sums, rank: int, source: int, rows: dict[int, Counter[int]]) -> None:
    """Add gradients of rows to those at a rank."""
    for row, added in rows.items():
        sums.setdefault((rank, source), {}).setdefault(row, Counter()).update(added)


@given(problems())
def test_every_gradient_comes_home_once(problem: Problem) -> None:
    sums: Sums = {}
    wanted: Sums = {}
    flying: list[tuple[int, int, int, dict[int, Counter[int]]]] = []  # (wait, receiver, source, rows)
    parts = sorted(computed(problem), key=lambda part: part[0])
    for index, rank, source, rows in parts:
        add(wanted, source, source, {row: Counter([rank]) for row in rows})
        for _, receiver, of, arrivals in [move for move in flying if move[0] <= index]:
            add(sums, receiver, of, arrivals)
        flying = [move for move in flying if move[0] > index]
        add(sums, rank, source, {row: Counter([rank]) for row in rows})
        step, here = problem.steps(rank)[index], sums.get((rank, source), {})
        if index:
            assert set(numbers(step.grad_rows)) == set(here)
        for move in step.grad_sends:
            assert move.wait > index
            flying.append((move.wait, move.receiver, move.source, {row: here.pop(row) for row in numbers(move.rows)}))
        assert index == 0 or not here, "a gradient stays behind"
    for wait, receiver, source, arrivals in flying:
        assert (wait, receiver) == (problem.ring.size, source)
        add(sums, receiver, source, arrivals)
    assert {key: rows for key, rows in sums.items() if rows} == wanted
    moves = problem.traffic.grads
    assert len({(move.sender, move.receiver, move.post) for move in moves}) == len(moves)


@given(problems())
def test_both_sides_of_a_message_post_it_in_one_step(problem: Problem) -> None:
    plans = [problem.steps(rank) for rank in range(problem.ring.size)]
    for kind, moves in enumerate(problem.traffic):
        out = [move for plan in plans for step in plan for move in (step.kv_sends, step.grad_sends)[kind]]
        into = [move for plan in plans for step in plan for move in (step.kv_recvs, step.grad_recvs)[kind]]
        assert sorted(out) == sorted(into) == sorted(moves)
        for rank, plan in enumerate(plans):
            for index, step in enumerate(plan):
                for move in (step.kv_sends, step.grad_sends)[kind]:
                    assert (move.sender, move.post) == (rank, index)
                for move in (step.kv_recvs, step.grad_recvs)[kind]:
                    assert (move.receiver, move.post) == (rank, index)


RINGS = [Ring(size, inner) for size in (1, 2, 3, 4, 5, 8, 16, 32) for inner in {1, 2, 4, size} if size % inner == 0]


@pytest.mark.parametrize("ring_", RINGS, ids=lambda ring: f"{ring.size}in{ring.inner}")
@pytest.mark.parametrize("earlier", [0, 4])
def test_plain_causal_attention_is_two_kinds_of_rectangles_and_the_same_work_everywhere(
    ring_: Ring, earlier: int
) -> None:
    half = 2
    lengths = (2 * half * ring_.size,)
    problem = causal(ring_, *((earlier * ring_.size,) if earlier else ()), *lengths, segment=1 if earlier else 0)
    for rank in range(ring_.size):
        own, *others = problem.steps(rank)
        (tile,) = own.first
        assert tile.rows == TokenRange(0, 2 * half) and not own.more
        assert [tuple(block.keys) for block in tile.blocks] == [(0, earlier + 2 * half)]
        for step in others:
            shapes = [(tile.rows, block.keys) for tile in step.more for block in tile.blocks]
            if step.source < rank:
                assert shapes == [((0, 2 * half), (0, earlier + half))]
            else:
                front = [((0, half), (0, earlier))] if earlier else []
                assert shapes == [*front, ((half, 2 * half), (0, earlier + 2 * half))]
            assert not any(block.causal for tile in step.more for block in tile.blocks)
            work = sum(rows.size * keys.size for rows, keys in shapes)
            assert work == 2 * half * half + 2 * half * earlier


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 16, 32])
def test_the_blocks_of_all_ranks_are_the_causal_mask(ranks: int) -> None:
    problem = causal(Ring(ranks, ranks), 2 * ranks)
    total = torch.zeros(2 * ranks, 2 * ranks, dtype=torch.int64)
    for rank in range(ranks):
        rows = torch.tensor(numbers(problem.queries[rank]))
        for step in problem.steps(rank):
            columns = torch.tensor(numbers(problem.keys[step.source]))[numbers(step.kv_rows)]
            total[rows[:, None], columns] += scores((*step.first, *step.more), (1, 2, len(columns)))[0]
    assert torch.equal(total, torch.ones_like(total).tril())


def test_a_kernel_without_rectangles_gets_the_square_and_the_keys_before_it() -> None:
    problem = causal(Ring(2, 2), 8, 8, segment=1)
    (tile,) = problem.steps(0, rectangular=False)[0].first
    assert [(tuple(block.keys), block.causal) for block in tile.blocks] == [((4, 8), True), ((0, 4), False)]


def test_a_buffer_with_some_of_the_queries_own_positions_begins_those_rows_alone() -> None:
    cover = plan_tiles((TokenRange(0, 4), TokenRange(8, 12)), (TokenRange(0, 4),), Mask(1), rectangular=True)
    assert [(tile.rows, tile.blocks[0].keys, tile.blocks[0].causal) for tile in cover.first] == [((0, 4), (0, 4), True)]
    assert [(tile.rows, tile.blocks[0].keys, tile.blocks[0].causal) for tile in cover.more] == [((4, 8), (0, 4), False)]


@pytest.mark.parametrize("lengths", [(1,), (1, 2), (2, 1, 3)])
@pytest.mark.parametrize("ring_", RINGS, ids=lambda ring: f"{ring.size}in{ring.inner}")
def test_bytes_and_messages_are_the_formulas(ring_: Ring, lengths: tuple[int, ...]) -> None:
    for ulysses in (1, 3, 8):
        if ulysses * ring_.size > 64:
            continue
        layout = Layout(Mesh(ulysses, ring_.size), tuple(4 * ulysses * ring_.size * length for length in lengths))
        setup = LayerShape(layout, Heads(24, 4 if ulysses == 8 else 3), batch=2, dim=16)
        row = 2 * 2 * 16 * setup.heads.per_rank(ulysses).kv
        sent, grads, messages, grad_messages = 0, 0, 0, 0
        for segment in range(len(lengths)):
            problem = Problem(ring_, layout, range(segment, segment + 1), Mask(2))
            sent += ulysses * sum(size(move.rows) for move in problem.traffic.keys)
            grads += ulysses * sum(size(move.rows) for move in problem.traffic.grads)
            messages += 2 * ulysses * len(problem.traffic.keys)
            grad_messages += 2 * ulysses * len(problem.traffic.grads)
        assert sent == grads
        counted = Volume(sent * row * 2, sent * row * 2 + grads * row * 4, messages, messages + grad_messages)
        assert ring(setup, ring_.inner) == counted


@pytest.mark.parametrize("ring_", [r for r in RINGS if r.size > 1], ids=lambda ring: f"{ring.size}in{ring.inner}")
def test_three_quarters_of_the_keys_travel_and_no_rank_sends_more_than_all(ring_: Ring) -> None:
    problem = causal(ring_, 4 * ring_.size)
    shard = size(problem.keys[0])
    for moves in problem.traffic:
        by_sender = Counter[int]()
        for move in moves:
            by_sender[move.sender] += size(move.rows)
        assert sum(by_sender.values()) * 4 == 3 * ring_.size * (ring_.size - 1) * shard
        assert max(by_sender.values()) <= (ring_.size - 1) * shard
    setup = LayerShape(problem.layout, Heads(4, 4))
    assert ring(setup).bytes <= 0.75 * peer_ring(setup).bytes


def test_a_window_and_documents_stop_keys_that_nobody_sees() -> None:
    ranks, chunk = 8, 16
    layout = Layout(Mesh(1, ranks), (2 * ranks * chunk,))
    window = Problem(Ring(ranks, ranks), layout, range(1), Mask(1, window=4))
    # Of every chunk but the last, the last 4 keys are seen by the next chunk's rank: most of them a hop or R - 1 away.
    assert sum(size(move.rows) for move in window.traffic.grads if move.wait == ranks) == 4 * (2 * ranks - 2)
    assert sum(size(move.rows) for move in window.traffic.keys) <= 4 * ranks * ranks
    alone = Problem(Ring(ranks, ranks), layout, range(1), Mask(1, None, Documents((packed([chunk] * 2 * ranks),))))
    assert alone.traffic == ((), ())


@given(problems(), st.booleans())
def test_gathered_keys_are_attended_once(problem: Problem, rectangular: bool) -> None:
    seen = problem.seen()
    for rank in range(problem.ring.size):
        rows = numbers(problem.queries[rank])
        tiles = plan_all_gather(problem.layout, rank, problem.segments, problem.mask, rectangular=rectangular)
        assert torch.equal(scores(tiles, (problem.mask.batch, len(rows), seen.shape[-1])), seen[:, rows].long())
        starts = torch.zeros(problem.mask.batch, len(rows), dtype=torch.int64)
        for tile in tiles:
            starts[tile.batch.slice(), tile.rows.slice()] += 1
        assert (starts == 1).all()


def test_volumes_beside_others() -> None:
    layout = Layout(Mesh(8, 4), (1 << 17,))
    setup = LayerShape(layout, Heads(32, 4))
    ours, theirs = all_to_all(setup), peer_all_to_all(setup, repeated=True)
    assert ours.bytes / theirs.bytes == 80 / 128 <= 0.65
    assert ours.forward_bytes == (1 << 17) * 7 * 10 * 128 * 2  # tokens, to 7 others, (32 + 2 * 8 + 32) / 8 heads
    assert (ours.forward_messages, theirs.forward_messages) == (2 * 32, 4 * 32)
    with pytest.raises(ValueError, match="4 key-value heads cannot be divided among 8 ranks"):
        peer_all_to_all(setup, repeated=False)
    plain = LayerShape(layout, Heads(32, 32))
    assert peer_all_to_all(plain, repeated=False).bytes == all_to_all(plain).bytes

    rank_tokens, hidden = (1 << 17) // 32, 32 * 128
    strategy, around = paper_elements(plain)
    assert strategy == 8 * rank_tokens * hidden  # 8 all-to-alls of a rank's tokens
    assert strategy * 32 * 7 / 8 * 2 == all_to_all(plain).bytes
    assert around == 4 * (1 << 17) * hidden / 8
    assert around / 4 * 2 * 3 / 4 * 32 * 2 == peer_ring(plain).forward_bytes  # two of its four volumes, over R - 1 of R
    keys = peer_ring(plain).forward_bytes
    assert peer_ring(plain).backward_bytes == keys + keys * 4 // 3 * 2  # keys again; gradients R hops, in float32
    assert all_gather(plain, kept=True).forward_bytes == peer_ring(plain).forward_bytes
    assert (
        all_gather(plain, kept=False).bytes
        == all_gather(plain, kept=True).bytes + all_gather(plain, kept=True).forward_bytes
    )
    alone = LayerShape(Layout(Mesh(1, 1), (8,)), Heads(4, 4))
    nothing = Volume(0, 0, 0, 0)
    assert [f(alone) for f in (all_to_all, ring, peer_ring)] == [nothing] * 3 and all_gather(
        alone, kept=True
    ) == nothing
    assert paper_elements(alone) == (0, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ring(8, 3), "windows of 3 do not divide a ring of 8 ranks; give [1, 2, 4, 8]"),
        (lambda: Ring(0, 1), "windows of 1 do not divide a ring of 0 ranks"),
        (lambda: Mask(1, -1), "sliding window of -1 keys"),
        (lambda: Mask(2, None, Documents((packed([4]),))), "1 lists of documents for a batch of 2"),
        (
            lambda: plan_transfers(Ring(2, 2), ((TokenRange(0, 2),),), ((TokenRange(0, 2),),), Mask(1)),
            "1 query shards and 1 key shards",
        ),
        (
            lambda: plan_tiles((TokenRange(0, 4),), (TokenRange(2, 6),), Mask(1), rectangular=True),
            "queries have positions 0 to 4, but only 2 of these positions have keys ([(2, 4)])",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()  # type: ignore[operator]
