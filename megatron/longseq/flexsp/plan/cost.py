"""Seconds and memory of a group that works on a set of sequences.

FlexSP (arXiv 2412.01523, equations 11 to 14) models a group of degree d by the tokens S of its sequences and the sum Q
of their squared lengths: (a1 Q + a2 S) / d for compute, S times bytes per token over a measured bandwidth for the
all-to-all of Ulysses, and a fixed start-up. This module adds rings, which send keys beside attention: of a ring's
messages, only the part that takes longer than attention costs time, in forward and in backward each. Bytes per token
are those of `attention.plan.comm_volume`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Literal, get_args

from megatron.longseq.attention.plan.comm_volume import LayerShape, Volume, all_to_all, ring
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout, Mesh, length_multiple
from megatron.longseq.flexsp.plan.plan import Kind

KindFamily = Literal["ulysses", "ring", "hybrid"]
FAMILIES: tuple[KindFamily, ...] = get_args(KindFamily)


@dataclass(frozen=True, slots=True)
class GroupLinks:
    """Speeds of the links inside a group.

    Attributes:
        node: ranks of a node.
        all_to_all: (ranks U, bytes per second that a rank sends in an all-to-all of U neighbouring ranks), ascending.
        ring_inside: bytes per second of a hop of a ring inside a node.
        ring_between: bytes per second that leave a node, which the rings that cross its border share.
        all_to_all_latency, ring_latency: seconds per message.
        ring_adapter: most bytes per second of one ring between nodes, whose hop uses one network adapter; 0: no limit.

    Raises:
        ValueError: A speed is not positive, a latency is negative, or the table is not ascending.
    """

    node: int
    all_to_all: tuple[tuple[int, float], ...]
    ring_inside: float
    ring_between: float
    all_to_all_latency: float = 0.0
    ring_latency: float = 0.0
    ring_adapter: float = 0.0

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.all_to_all]
        speeds = [*(speed for _, speed in self.all_to_all), self.ring_inside, self.ring_between]
        if self.node < 1 or sizes != sorted(set(sizes)) or any(size < 2 for size in sizes):
            raise ValueError(
                f"links of nodes of {self.node} ranks, all-to-alls of {sizes} ranks: a node has at least 1 rank, and "
                "the sizes of all-to-alls ascend from at least 2"
            )
        others = (self.all_to_all_latency, self.ring_latency, self.ring_adapter)
        if not all(speed > 0 for speed in speeds) or not all(0 <= one < math.inf for one in others):
            raise ValueError(f"links {self}: speeds must be above 0 bytes/s, and latencies at least 0 s and finite")

    def all_to_all_speed(self, size: int) -> float:
        """Return the bytes per second of a rank in an all-to-all of `size` neighbouring ranks.

        Between two sizes of the table on the same side of the node's size the speed is interpolated on logarithmic
        axes. Otherwise the next larger size of the table counts, or the largest.

        Raises:
            ValueError: The table is empty.
        """
        if not self.all_to_all:
            raise ValueError(f"all-to-all of {size} ranks: the table of all-to-all speeds is empty")
        for (a, slow), (b, fast) in pairwise(self.all_to_all):
            if a <= size <= b and (a <= self.node) == (b <= self.node):
                share = math.log(size / a) / math.log(b / a)
                return float(slow ** (1 - share) * fast**share)
        return next((speed for known, speed in self.all_to_all if known >= size), self.all_to_all[-1][1])

    def ring_speed(self, kind: Kind) -> float:
        """Return the bytes per second of a hop of each of the U rings of a group of neighbouring ranks."""
        if kind.degree <= self.node:
            return self.ring_inside
        shared = min(self.ring_inside, self.ring_between / min(kind.ulysses, self.node))
        return min(shared, self.ring_adapter) if self.ring_adapter else shared


@dataclass(frozen=True, slots=True)
class KindCost:
    """Seconds of a group of one kind, as a function of its tokens S and the sum Q of its squared lengths.

    Attributes:
        kind: the kind.
        startup: seconds that do not depend on the sequences.
        token: seconds per token.
        square: seconds per squared token: attention.
        rings: of forward and backward each, seconds per token of the ring's messages, and seconds per squared token of
            the attention that hides them; empty without a ring.
    """

    kind: Kind
    startup: float
    token: float
    square: float
    rings: tuple[tuple[float, float], ...] = ()

    def seconds(self, tokens: float, squares: float) -> float:
        """Return the seconds of a group with that many tokens and that sum of squared lengths.

        Args:
            tokens: sum of the lengths, S.
            squares: sum of the squared lengths, Q.
        """
        seconds = self.startup + self.token * tokens + self.square * squares
        for sent, hidden in self.rings:
            exposed = sent * tokens - hidden * squares
            if exposed > 0:
                seconds += exposed
        return seconds

    def pieces(self) -> tuple[tuple[float, float], ...]:
        """Return (seconds per token, seconds per squared token) of linear functions whose largest is the time.

        The start-up is left out.
        """
        pieces = [(self.token, self.square)]
        for sent, hidden in self.rings:
            pieces += [(token + sent, square - hidden) for token, square in pieces]
        return tuple(dict.fromkeys(pieces))


@dataclass(frozen=True, slots=True)
class GroupCostModel:
    """Cost model of a group; see the module.

    Attributes:
        name: shown in tables and messages.
        square: seconds per squared token of one rank, a1: attention, forward and backward.
        linear: seconds per token of one rank, a2: everything that grows with the number of tokens.
        fixed: seconds of every micro-batch, b1.
        tokens_per_rank: most tokens of a rank; a group of degree d holds d times as many.
        layers: number of layers.
        heads: attention heads of a tensor-parallel rank.
        dim: size of a head.
        links: speeds of the links.
        item, grad_item: bytes of an element of keys and outputs, and of a ring's gradients.
        overlap: share of attention that can hide a ring's messages.
        forward_share: share of the forward in attention's seconds.
        padding: None: sequences count with their own tokens; otherwise they are padded to the multiple that their
            group's degree needs with that many tensor-parallel ranks (`attention.plan.layout.length_multiple`).

    Raises:
        ValueError: A number is out of range.
    """

    name: str
    square: float
    linear: float
    fixed: float
    tokens_per_rank: int
    layers: int
    heads: Heads
    dim: int
    links: GroupLinks
    item: int = 2
    grad_item: int = 4
    overlap: float = 1.0
    forward_share: float = 2 / 7
    padding: int | None = None
    _cache: dict[Kind, KindCost] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        seconds = (self.square, self.linear, self.fixed)
        if not all(math.isfinite(one) and one >= 0 for one in seconds) or self.square + self.linear <= 0:
            raise ValueError(
                f"cost model {self.name}: {self.square} s per squared token, {self.linear} s per token, {self.fixed} s "
                "per micro-batch: none may be negative, and one of the first two must be above 0"
            )
        if self.tokens_per_rank < 1:
            raise ValueError(f"cost model {self.name}: {self.tokens_per_rank} tokens per rank; give at least 1")
        if min(self.layers, self.dim, self.item, self.grad_item) < 1 or (self.padding is not None and self.padding < 1):
            raise ValueError(
                f"cost model {self.name}: layers, dim, item, grad_item and padding must be at least 1, but are "
                f"{self.layers}, {self.dim}, {self.item}, {self.grad_item} and {self.padding}"
            )
        if not (0 <= self.overlap <= 1 and 0 <= self.forward_share <= 1):
            raise ValueError(
                f"cost model {self.name}: overlap {self.overlap} and forward_share {self.forward_share} must be from 0 "
                "to 1"
            )

    def capacity(self, degree: int) -> int:
        """Return the most tokens that a group of a degree holds."""
        return degree * self.tokens_per_rank

    def tokens(self, degree: int, length: int) -> int:
        """Return the tokens of a sequence in a group of a degree: its own, or padded (`padding`).

        Args:
            degree: number of ranks.
            length: tokens of the sequence.
        """
        if self.padding is None:
            return length
        multiple = length_multiple(degree, self.padding)
        return -(-length // multiple) * multiple

    def kinds(self, degree: int, families: Iterable[KindFamily] = FAMILIES) -> tuple[Kind, ...]:
        """Return the kinds of a degree that the heads allow.

        Args:
            degree: number of ranks.
            families: "ulysses" (one all-to-all), "ring" (one ring), "hybrid" (both). One rank alone needs none of them.
        """
        families = tuple(families)
        if degree == 1:
            return (Kind(1, 1),)
        kinds = []
        for ulysses in range(1, degree + 1):
            family: KindFamily = "ring" if ulysses == 1 else "ulysses" if ulysses == degree else "hybrid"
            if degree % ulysses == 0 and self.heads.allows(ulysses) and family in families:
                kinds.append(Kind(ulysses, degree // ulysses))
        return tuple(kinds)

    def of_kind(self, kind: Kind) -> KindCost:
        """Return the cost of a kind."""
        if kind not in self._cache:
            self._cache[kind] = self._kind_cost(kind)
        return self._cache[kind]

    def seconds(self, kind: Kind, lengths: Sequence[int]) -> float:
        """Return the seconds of a group, forward and backward; 0 without sequences.

        Args:
            kind: how the group computes attention.
            lengths: tokens of its sequences.
        """
        if not lengths:
            return 0.0
        tokens = [self.tokens(kind.degree, length) for length in lengths]
        return self.of_kind(kind).seconds(sum(tokens), sum(one * one for one in tokens))

    def _kind_cost(self, kind: Kind) -> KindCost:
        degree, links = kind.degree, self.links
        startup, token, rings = self.fixed, self.linear / degree, []
        if kind.ulysses > 1:
            sent = _volume(kind, self.heads, self.dim, self.item, self.grad_item)[0]
            token += self.layers * sent.bytes / sent.tokens / degree / links.all_to_all_speed(kind.ulysses)
            startup += self.layers * sent.messages / degree * links.all_to_all_latency
        if kind.ring > 1:
            sent = _volume(kind, self.heads, self.dim, self.item, self.grad_item)[1]
            startup += self.layers * sent.messages / degree * links.ring_latency
            seconds = self.layers / sent.tokens / degree / links.ring_speed(kind)
            attention = self.overlap * self.square / degree
            rings = [
                (sent.forward_bytes * seconds, attention * self.forward_share),
                (sent.backward_bytes * seconds, attention * (1 - self.forward_share)),
            ]
        return KindCost(kind, startup, token, self.square / degree, tuple(rings))


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a group sends for one layer of `tokens` tokens, all ranks together."""

    tokens: int
    forward_bytes: int
    backward_bytes: int
    messages: int

    @property
    def bytes(self) -> int:
        return self.forward_bytes + self.backward_bytes


@lru_cache(maxsize=4096)
def _volume(kind: Kind, heads: Heads, dim: int, item: int, grad_item: int) -> tuple[_Sent, _Sent]:
    """Return what a layer sends by all-to-all and by ring; both grow with the number of tokens."""
    tokens = 4 * kind.degree  # a multiple of the ring's four quarters and of two chunks a rank
    layout = Layout(Mesh(kind.ulysses, kind.ring), (tokens,))
    layer = LayerShape(layout, heads, dim=dim, item=item, grad_item=grad_item)

    def sent(volume: Volume) -> _Sent:
        messages = volume.forward_messages + volume.backward_messages
        return _Sent(tokens, volume.forward_bytes, volume.backward_bytes, messages)

    return sent(all_to_all(layer)), sent(ring(layer))
