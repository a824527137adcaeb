"""Ring attention as data: which blocks a rank computes at each step, and which keys and gradients travel when.

In step 0 a rank attends to its own keys; in each later one to those of another rank. Keys travel against the order of
ranks (r to r - 1), so the ranks that need all of a zigzag shard see it first: its second half stays behind at rank 0.
Only rows of keys that a later rank sees travel at all, under any mask: of plain causal attention 3/4 of the bytes.

The gradient of a rank's keys starts at the first other rank that sees them, follows the keys, and goes home from the
last: as far as the keys went, not a round more. The rank's own part waits at home.

In a double ring of windows of `inner` ranks, keys go round inside a window, while a copy goes to the next window; each
window sends its sum of gradients home.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from megatron.longseq.attention.plan.layout import Layout
from megatron.longseq.attention.plan.ranges import Spans, before, common, minus, size, union
from megatron.longseq.attention.plan.ring_tiles import Cover, Mask, needed, plan_shard
from megatron.longseq.attention.plan.tiles import Block, Span, Tile, plan_causal


@dataclass(frozen=True, slots=True)
class Ring:
    """Ranks around which keys travel.

    Attributes:
        size: ranks R.
        inner: ranks of a window of a double ring (--ring-window); `size`: a plain ring.
        reverse: keys go from r to r - 1; else to r + 1, where less can stay behind.

    Raises:
        ValueError: windows that do not divide the ring.
    """

    size: int
    inner: int
    reverse: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.inner < 1 or self.size % self.inner:
            legal = [width for width in range(1, self.size + 1) if self.size % width == 0]
            raise ValueError(f"a ring of {self.size} ranks in windows of {self.inner}: give a window of {legal}")

    def visited(self, source: int, step: int) -> int:
        """Return the rank that computes with a source's keys in a step."""
        return self._moved(source, -step if self.reverse else step)

    def source(self, rank: int, step: int) -> int:
        """Return whose keys a rank computes with in a step."""
        return self._moved(rank, step if self.reverse else -step)

    def _moved(self, rank: int, step: int) -> int:
        outer, inner = divmod(abs(step), self.inner)
        sign = 1 if step >= 0 else -1
        window = (rank // self.inner + sign * outer) % (self.size // self.inner)
        return window * self.inner + (rank + sign * inner) % self.inner


class Transfer(NamedTuple):
    """Rows of a source's keys and values, or of their gradients, from one rank to another: one message.

    Attributes:
        source: ring index of the rank whose keys they are.
        sender, receiver: ring indices.
        rows: of the source's buffer of keys.
        post: step in which both sides start it: keys before the step's blocks are computed, gradients after.
        wait: step in which the receiver needs it: keys before its blocks, gradients after; the number of steps: at the
            end.
    """

    source: int
    sender: int
    receiver: int
    rows: Spans
    post: int
    wait: int


class Traffic(NamedTuple):
    """Every message of a ring: keys and values (in forward, and again in backward), and their gradients."""

    keys: tuple[Transfer, ...]
    grads: tuple[Transfer, ...]


class Step(NamedTuple):
    """What a rank does in one step.

    Attributes:
        source: whose keys.
        held: rows of the source's keys that lie here, one after another; empty: nothing came, nothing is computed.
        begun, added: blocks, see `Cover`; they count keys from the first one that is held.
        summed: rows of the source's keys whose gradients lie here after this step: those that came and those computed.
            In step 0 the rank's own, all of them, which stay.
        keys_out, keys_in: posted before the blocks.
        grads_out, grads_in: posted after the blocks, once this step's sum is complete.
    """

    source: int
    held: Spans
    begun: tuple[Tile, ...]
    added: tuple[Tile, ...]
    summed: Spans
    keys_out: tuple[Transfer, ...]
    keys_in: tuple[Transfer, ...]
    grads_out: tuple[Transfer, ...]
    grads_in: tuple[Transfer, ...]


Shards = tuple[Spans, ...]


@lru_cache(maxsize=256)
def plan_traffic(ring: Ring, queries: Shards, keys: Shards, mask: Mask) -> Traffic:
    """Return every message of a ring, in the order of sources and steps.

    Args:
        ring: the ranks.
        queries: positions of every rank's queries (`Layout.shards`).
        keys: positions of every rank's keys, those of earlier segments included.
        mask: what is seen.

    Raises:
        ValueError: shards of another number of ranks.
    """
    if not len(queries) == len(keys) == ring.size:
        raise ValueError(f"shards of {len(queries)} (queries) and {len(keys)} (keys) ranks in a ring of {ring.size}")
    key_moves: list[Transfer] = []
    grad_moves: list[Transfer] = []
    for source in range(ring.size):
        ranks = [ring.visited(source, step) for step in range(ring.size)]
        wanted = [needed(queries[rank], keys[source], mask) for rank in ranks]
        wanted[0] = ()  # the source's own
        key_moves += _key_moves(source, ranks, wanted, ring.inner)
        grad_moves += _grad_moves(source, ranks, wanted, ring.inner)
    return Traffic(tuple(key_moves), tuple(grad_moves))


def _joined(sets: Iterable[Spans]) -> list[Spans]:
    """Return the union of the first set, of the first two, and so on."""
    return list(accumulate(sets, lambda left, right: union([*left, *right])))


def _key_moves(source: int, ranks: list[int], wanted: list[Spans], inner: int) -> list[Transfer]:
    """Keys go on inside a window as far as it wants them, and from its first rank to the next window's."""
    moves = []
    onward = _joined(reversed(wanted))[::-1]  # by a step and all after it
    for begin in range(0, len(ranks), inner):
        inside = _joined(reversed(wanted[begin : begin + inner]))[::-1]
        hops = [(step, step + 1, inside[step + 1 - begin]) for step in range(begin, begin + inner - 1)]
        if begin + inner < len(ranks):
            hops.append((begin, begin + inner, onward[begin + inner]))
        moves += [Transfer(source, ranks[post], ranks[wait], rows, post, wait) for post, wait, rows in hops if rows]
    return moves


def _grad_moves(source: int, ranks: list[int], wanted: list[Spans], inner: int) -> list[Transfer]:
    """Gradients follow the keys inside a window, from the first rank that adds to the last, and from there go home."""
    moves = []
    for begin in range(0, len(ranks), inner):
        window = wanted[begin : begin + inner]
        so_far, later = _joined(window), [*_joined(reversed(window))[-2::-1], ()]
        for step, rank in enumerate(ranks[begin : begin + inner], begin):
            done = minus(wanted[step], later[step - begin])
            passed = common(so_far[step - begin], later[step - begin])
            if done:
                moves.append(Transfer(source, rank, source, done, step, len(ranks)))
            if passed:
                moves.append(Transfer(source, rank, ranks[step + 1], passed, step, step + 1))
    return moves


@lru_cache(maxsize=256)
def plan_ring(
    ring: Ring, queries: Shards, keys: Shards, mask: Mask, rank: int, *, rectangular: bool
) -> tuple[Step, ...]:
    """Return the steps of a rank; arguments as of `plan_traffic` and `blocks.plan_causal`.

    Raises:
        ValueError: shards that do not fit.
    """
    traffic = plan_traffic(ring, queries, keys, mask)
    out = [[move for move in moves if move.sender == rank] for moves in traffic]
    into = [[move for move in moves if move.receiver == rank] for moves in traffic]
    steps = []
    for index in range(ring.size):
        source = ring.source(rank, index)
        everything = (Span(0, size(keys[source])),)
        held = everything if index == 0 else _arrived(into[0], source)
        cover = plan_shard(queries[rank], keys[source], mask, rectangular=rectangular) if held else Cover((), ())
        came = [move for move in into[1] if move.source == source and move.wait == index]
        computed = everything if index == 0 else needed(queries[rank], keys[source], mask)
        steps.append(
            Step(
                source=source,
                held=held,
                begun=tuple(_packed(tile, held) for tile in cover.begun),
                added=tuple(_packed(tile, held) for tile in cover.added),
                summed=union([*computed, *(span for move in came for span in move.rows)]),
                keys_out=_posted(out[0], index),
                keys_in=_posted(into[0], index),
                grads_out=_posted(out[1], index),
                grads_in=_posted(into[1], index),
            )
        )
    return tuple(steps)


def _arrived(moves: list[Transfer], source: int) -> Spans:
    return union(span for move in moves if move.source == source for span in move.rows)


def _posted(moves: list[Transfer], step: int) -> tuple[Transfer, ...]:
    return tuple(move for move in moves if move.post == step)


def _packed(tile: Tile, held: Spans) -> Tile:
    """Return a tile that counts keys from the first one held; what a block names lies in one span of them."""
    blocks = (
        Block(block.keys.moved(before(held, block.keys.begin) - block.keys.begin), block.causal, block.window)
        for block in tile.blocks
    )
    return Tile(tile.batch, tile.rows, tuple(blocks))


def plan_gathered(layout: Layout, ring: int, segments: range, mask: Mask, *, rectangular: bool) -> tuple[Tile, ...]:
    """Return the tiles of a ring index whose rank has gathered every key up to the last segment's end, by position.

    Args:
        layout: of the tokens.
        ring: index in the ring.
        segments: whose tokens are the queries.
        mask: what is seen.
        rectangular: see `blocks.plan_causal`.
    """
    tiles: list[Tile] = []
    row = 0
    for queries in layout.shard(ring, segments):
        for tile in plan_causal(
            queries, mask.batch, rectangular=rectangular, window=mask.window, documents=mask.documents
        ):
            tiles.append(Tile(tile.batch, tile.rows.moved(row), tile.blocks))
        row += queries.size
    return tuple(tiles)
