"""What a picture of the method shows, from the layout and the ring's plan: chunks before and after, blocks by step."""

from typing import NamedTuple

from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.ranges import Spans, size
from megatron.longseq.attention.plan.ring_schedule import Ring, Step, plan_ring
from megatron.longseq.attention.plan.ring_tiles import Mask
from megatron.longseq.attention.plan.tiles import Span


class Cell(NamedTuple):
    """A square of scores that a ring index computes: chunk `query` of the queries, chunk `key` of the keys."""

    ring: int
    query: int
    key: int


class Sending(NamedTuple):
    """Keys on their way while a step is computed: between ring indices, and which part of the source's they are."""

    sender: int
    receiver: int
    part: float


class Scene(NamedTuple):
    """A sequence of 2C chunks.

    Attributes:
        mesh: the ranks.
        before: chunks that every rank holds, in its order, all heads of them.
        after: the same behind the all-to-all, a share of the heads.
        steps: of the ring: what is computed, and what is on its way meanwhile.
    """

    mesh: Mesh
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[tuple[Cell, ...], tuple[Sending, ...]], ...]


def scene(mesh: Mesh) -> Scene:
    """Return what is to be seen of plain causal attention; a chunk is one token."""
    layout = Layout(mesh, (2 * mesh.size,))
    shards = layout.shards(range(1))
    ring = Ring(mesh.ring, mesh.ring)
    plans = [plan_ring(ring, shards, shards, Mask(1), rank, rectangular=True) for rank in range(mesh.ring)]
    steps = [
        (
            tuple(cell for rank, plan in enumerate(plans) for cell in _cells(rank, plan[index], shards)),
            tuple(
                Sending(move.sender, move.receiver, size(move.rows) / size(shards[move.source]))
                for plan in plans
                for move in plan[index].keys_out
            ),
        )
        for index in range(mesh.ring)
    ]
    return Scene(
        mesh,
        tuple(_numbers(layout.positions(rank, 0)) for rank in range(mesh.size)),
        tuple(_numbers(layout.ring_positions(mesh.place(rank).ring, 0)) for rank in range(mesh.size)),
        tuple(steps),
    )


def _cells(rank: int, step: Step, shards: tuple[Spans, ...]) -> list[Cell]:
    queries = _numbers(shards[rank])
    source = _numbers(shards[step.source])
    keys = [source[row] for row in _numbers(step.held)]
    cells = []
    for tile in (*step.begun, *step.added):
        for block in tile.blocks:
            for row in range(*tile.rows):
                last = block.keys.end - (tile.rows.end - 1 - row) * block.causal
                cells += [Cell(rank, queries[row], keys[key]) for key in range(block.keys.begin, last)]
    return cells


def _numbers(spans: tuple[Span, ...]) -> tuple[int, ...]:
    return tuple(number for span in spans for number in range(*span))
