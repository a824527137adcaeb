"""Schedule of ring attention: which blocks a rank computes in each step, and which messages it sends and receives.

In step 0 a rank attends to its own keys, in each later step to those of another rank. Keys travel from rank r to rank
r - 1. In this direction the ranks that see a whole zigzag shard come first, and only its first half goes on to the
others. Rows that no later rank sees are not sent, under any mask: plain causal attention sends 3/4 of the bytes.

The gradient of a rank's keys starts at the first other rank that sees them, follows the keys, and returns from the last
such rank to its owner, where the owner's own part is added.

In a double ring (LoongTrain, arXiv 2406.18485) keys go round inside windows of `inner` ranks, while a copy goes to the
next window. Each window sends its sum of gradients to the owner.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from megatron.longseq.attention.plan.launches import Block, JoinedTiles, Tile, Tiles
from megatron.longseq.attention.plan.layout import Layout
from megatron.longseq.attention.plan.ranges import (
    RowFinder,
    TokenRange,
    TokenRanges,
    difference,
    intersection,
    size,
    union,
)
from megatron.longseq.attention.plan.tiles import (
    Mask,
    TilePlan,
    cached_plan,
    plan_tiles,
    visible_rows,
)


@dataclass(frozen=True, slots=True)
class Ring:
    """Ranks around which keys travel.

    Attributes:
        size: number of ranks R.
        inner: ranks of a window of a double ring (--ring-window); `size` for a plain ring.

    Raises:
        ValueError: The windows do not divide the ring.
    """

    size: int
    inner: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.inner < 1 or self.size % self.inner:
            legal = [width for width in range(1, self.size + 1) if self.size % width == 0]
            raise ValueError(f"windows of {self.inner} do not divide a ring of {self.size} ranks; give {legal}")

    def visited(self, source: int, step: int) -> int:
        """Return the rank that computes with a source's keys in a step.

        Args:
            source: ring index of the owner of the keys.
            step: step of the ring, from 0.
        """
        return self._shifted(source, -step)

    def source(self, rank: int, step: int) -> int:
        """Return the rank whose keys a rank computes with in a step.

        Args:
            rank: ring index of the rank that computes.
            step: step of the ring, from 0.
        """
        return self._shifted(rank, step)

    def _shifted(self, rank: int, step: int) -> int:
        outer, inner = divmod(abs(step), self.inner)
        sign = 1 if step >= 0 else -1
        window = (rank // self.inner + sign * outer) % (self.size // self.inner)
        return window * self.inner + (rank + sign * inner) % self.inner


class KVTransfer(NamedTuple):
    """One message: rows of a source's keys and values, or of their gradients, from one rank to another.

    Attributes:
        source: ring index of the owner of the keys.
        sender, receiver: ring indices.
        rows: rows of the source's buffer of keys.
        post: step in which both sides start it: keys before the step's blocks are computed, gradients after.
        wait: step in which the receiver needs it: keys before its blocks, gradients after; the number of steps for what
            is needed at the end.
    """

    source: int
    sender: int
    receiver: int
    rows: TokenRanges
    post: int
    wait: int


class RingTransfers(NamedTuple):
    """All messages of a ring.

    Attributes:
        keys: keys and values, sent in forward and again in backward.
        grads: their gradients.
    """

    keys: tuple[KVTransfer, ...]
    grads: tuple[KVTransfer, ...]


class RingStep(NamedTuple):
    """One step of one rank.

    Attributes:
        source: ring index of the owner of the step's keys.
        kv_rows: rows of the source's keys that this rank holds, one after another. Empty: nothing is computed.
        tiles: tiles of `first` and then of `more`, see `TilePlan`; their blocks count keys from the first row held.
        grad_rows: rows of the source's keys whose gradients lie here after the step, received or computed. In step 0
            all of the rank's own rows, which stay here.
        kv_sends, kv_recvs: messages posted before the blocks are computed.
        grad_sends, grad_recvs: messages posted after the blocks are computed and the step's gradients are summed.
    """

    source: int
    kv_rows: TokenRanges
    tiles: JoinedTiles
    grad_rows: TokenRanges
    kv_sends: tuple[KVTransfer, ...]
    kv_recvs: tuple[KVTransfer, ...]
    grad_sends: tuple[KVTransfer, ...]
    grad_recvs: tuple[KVTransfer, ...]

    @property
    def first(self) -> Tiles:
        """Tiles of the rank's own positions, see `TilePlan`."""
        return self.tiles.parts[0]

    @property
    def more(self) -> Tiles:
        """Tiles that are merged into existing results, see `TilePlan`."""
        return self.tiles.parts[1]


Shards = tuple[TokenRanges, ...]  # positions that every rank holds


@cached_plan(maxsize=256)
def plan_transfers(ring: Ring, queries: Shards, keys: Shards, mask: Mask) -> RingTransfers:
    """Return all messages of a ring, in the order of sources and steps.

    Args:
        ring: the ranks.
        queries: positions of every rank's queries (`Layout.shards`).
        keys: positions of every rank's keys, those of earlier segments included.
        mask: see `Mask`.

    Raises:
        ValueError: The number of shards is not the number of ranks.
    """
    if not len(queries) == len(keys) == ring.size:
        raise ValueError(f"{len(queries)} query shards and {len(keys)} key shards for a ring of {ring.size} ranks")
    key_transfers: list[KVTransfer] = []
    grad_transfers: list[KVTransfer] = []
    for source in range(ring.size):
        ranks = [ring.visited(source, step) for step in range(ring.size)]
        needs = [visible_rows(queries[rank], keys[source], mask) for rank in ranks]
        needs[0] = ()  # the source has its own rows
        key_transfers += _key_transfers(source, ranks, needs, ring.inner)
        grad_transfers += _grad_transfers(source, ranks, needs, ring.inner)
    return RingTransfers(tuple(key_transfers), tuple(grad_transfers))


def _running_union(sets: Iterable[TokenRanges]) -> list[TokenRanges]:
    """Return the union of the first set, of the first two, and so on."""
    return list(accumulate(sets, lambda left, right: union([*left, *right])))


def _key_transfers(source: int, ranks: list[int], needs: list[TokenRanges], inner: int) -> list[KVTransfer]:
    """Send keys on inside a window while a later rank needs them, and from its first rank to the next window's."""
    transfers = []
    onward = _running_union(reversed(needs))[::-1]  # what a step and all later ones need
    for begin in range(0, len(ranks), inner):
        inside = _running_union(reversed(needs[begin : begin + inner]))[::-1]
        hops = [(step, step + 1, inside[step + 1 - begin]) for step in range(begin, begin + inner - 1)]
        if begin + inner < len(ranks):
            hops.append((begin, begin + inner, onward[begin + inner]))
        transfers += [
            KVTransfer(source, ranks[post], ranks[wait], rows, post, wait) for post, wait, rows in hops if rows
        ]
    return transfers


def _grad_transfers(source: int, ranks: list[int], needs: list[TokenRanges], inner: int) -> list[KVTransfer]:
    """Send gradients along the keys' way inside a window, and from the last rank that adds to them to their owner."""
    transfers = []
    for begin in range(0, len(ranks), inner):
        window = needs[begin : begin + inner]
        so_far, later = _running_union(window), [*_running_union(reversed(window))[-2::-1], ()]
        for step, rank in enumerate(ranks[begin : begin + inner], begin):
            done = difference(needs[step], later[step - begin])
            passed = intersection(so_far[step - begin], later[step - begin])
            if done:
                transfers.append(KVTransfer(source, rank, source, done, step, len(ranks)))
            if passed:
                transfers.append(KVTransfer(source, rank, ranks[step + 1], passed, step, step + 1))
    return transfers


@cached_plan(maxsize=256)
def plan_ring_attention(
    ring: Ring, queries: Shards, keys: Shards, mask: Mask, rank: int, *, rectangular: bool
) -> tuple[RingStep, ...]:
    """Return the steps of a rank.

    Args:
        ring, queries, keys, mask: see `plan_transfers`.
        rank: ring index.
        rectangular: see `plan_tiles`.

    Raises:
        ValueError: The shards do not fit one another.
    """
    transfers = plan_transfers(ring, queries, keys, mask)
    sends = [[one for one in kind if one.sender == rank] for kind in transfers]
    recvs = [[one for one in kind if one.receiver == rank] for kind in transfers]
    steps = []
    for index in range(ring.size):
        source = ring.source(rank, index)
        everything = (TokenRange(0, size(keys[source])),)
        kv_rows = everything if index == 0 else _received(recvs[0], source)
        plan = (
            plan_tiles(queries[rank], keys[source], mask, rectangular=rectangular)
            if kv_rows
            else TilePlan(Tiles(), Tiles())
        )
        added = [one for one in recvs[1] if one.source == source and one.wait == index]
        computed = everything if index == 0 else visible_rows(queries[rank], keys[source], mask)
        steps.append(
            RingStep(
                source=source,
                kv_rows=kv_rows,
                tiles=JoinedTiles(_packed(plan.first, kv_rows), _packed(plan.more, kv_rows)),
                grad_rows=union([*computed, *(rows for one in added for rows in one.rows)]),
                kv_sends=_posted(sends[0], index),
                kv_recvs=_posted(recvs[0], index),
                grad_sends=_posted(sends[1], index),
                grad_recvs=_posted(recvs[1], index),
            )
        )
    return tuple(steps)


def _received(transfers: list[KVTransfer], source: int) -> TokenRanges:
    return union(rows for one in transfers if one.source == source for rows in one.rows)


def _posted(transfers: list[KVTransfer], step: int) -> tuple[KVTransfer, ...]:
    return tuple(one for one in transfers if one.post == step)


def _packed(tiles: Tiles, rows: TokenRanges) -> Tiles:
    """Return tiles whose blocks count keys through the rows held; a block never spans two ranges of them."""
    row = RowFinder(rows).before

    def packed(block: Block) -> Block:
        return Block(block.keys.shifted(row(block.keys.begin) - block.keys.begin), block.causal, block.window)

    return Tiles(Tile(tile.batch, tile.rows, tuple(packed(block) for block in tile.blocks)) for tile in tiles)


@cached_plan(maxsize=256)
def plan_layout_ring(
    ring: Ring, layout: Layout, segment: int, mask: Mask, rank: int, *, rectangular: bool
) -> tuple[RingStep, ...]:
    """Return `plan_ring_attention` of a segment's queries and of the keys of all segments up to it.

    Args:
        ring: the ranks.
        layout: positions of the tokens; its mesh has `ring.size` ring indices.
        segment: index of the segment.
        mask: see `Mask`.
        rank: ring index.
        rectangular: see `plan_tiles`.

    Returns:
        The steps of the rank, one for each ring index.
    """
    own, seen = range(segment, segment + 1), range(segment + 1)
    return plan_ring_attention(ring, layout.shards(own), layout.shards(seen), mask, rank, rectangular=rectangular)


@cached_plan(maxsize=256)
def plan_all_gather(layout: Layout, ring: int, segments: range, mask: Mask, *, rectangular: bool) -> Tiles:
    """Return the tiles of a rank that has gathered all keys up to the last segment's end, in order of position.

    Args:
        layout: see `Layout`.
        ring: ring index of the rank.
        segments: segments whose tokens are the queries.
        mask: see `Mask`.
        rectangular: see `plan_tiles`.
    """
    end = layout.begin(segments.stop)
    queries = layout.shard(ring, segments)
    return plan_tiles(queries, (TokenRange(0, end),), mask, rectangular=rectangular).first
