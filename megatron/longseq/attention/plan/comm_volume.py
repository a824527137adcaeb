"""Communication volume of context-parallel attention per layer: exact formulas, for this project and for others.

Bytes and messages are summed over the C context-parallel ranks of one tensor-parallel rank, and over the segments of a
sequence. In a ring, keys and values (or their gradients) are one message each. An all-to-all, an all-gather or a
reduce-scatter counts as one message per rank.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout


class Volume(NamedTuple):
    """Bytes and messages sent in forward and in backward."""

    forward_bytes: int
    backward_bytes: int
    forward_messages: int
    backward_messages: int

    @property
    def bytes(self) -> int:
        """Bytes of forward and backward together."""
        return self.forward_bytes + self.backward_bytes


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's attention.

    Attributes:
        layout: token positions on the ranks.
        heads: heads of a tensor-parallel rank.
        batch: number of sequences.
        dim: size of a head.
        item: bytes of an element of queries, keys, values and outputs.
        grad_item: bytes of an element of the ring's gradients; 4 for float32.
    """

    layout: Layout
    heads: Heads
    batch: int = 1
    dim: int = 128
    item: int = 2
    grad_item: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.layout.lengths)

    @property
    def segments(self) -> int:
        """Number of segments of the sequence."""
        return len(self.layout.lengths)

    def key_elements(self, rows: int) -> int:
        """Return the elements of some rows of keys and values, summed over the rings of all Ulysses indices."""
        ulysses = self.layout.mesh.ulysses
        return rows * 2 * self.heads.per_rank(ulysses).kv * self.batch * self.dim * ulysses


def all_to_all(layer: LayerShape) -> Volume:
    """Return the volume of this project's Ulysses: one all-to-all of queries, keys and values, one of outputs.

    Keys and values are sent for max(Hk, U) heads, never for Hq. Backward sends the same volume of gradients.
    """
    ulysses = layer.layout.mesh.ulysses
    return _all_to_all(layer, layer.heads.sent(ulysses) + layer.heads.query, collectives=2)


def _all_to_all(layer: LayerShape, heads: int, collectives: int) -> Volume:
    """Return the volume of sending some heads per token to all other ranks of the Ulysses group, each way."""
    ulysses = layer.layout.mesh.ulysses
    if ulysses == 1:
        return Volume(0, 0, 0, 0)
    sent = layer.tokens * (ulysses - 1) * (heads // ulysses) * layer.batch * layer.dim * layer.item
    messages = collectives * layer.layout.mesh.size * layer.segments
    return Volume(sent, sent, messages, messages)


def ring_rows(layout: Layout) -> int:
    """Return the rows of keys that one ring sends for causal attention of every segment.

    A rank sends all rows of its own segment to the ranks before it and half of them to those behind, and all rows of
    earlier segments to all ranks. As many rows of gradients are sent.
    """
    ring = layout.mesh.ring
    own = sum(3 * (ring - 1) * length // 4 for length in layout.lengths)
    earlier = sum((ring - 1) * layout.begin(segment) for segment in range(len(layout.lengths)))
    return own + earlier


def ring(layer: LayerShape, inner: int | None = None) -> Volume:
    """Return the volume of this project's ring: keys and values in forward and in backward, gradients once.

    Args:
        layer: shape of the layer.
        inner: ranks of a window of a double ring, which sends the same bytes; None: a plain ring.
    """
    mesh, elements = layer.layout.mesh, layer.key_elements(ring_rows(layer.layout))
    inner = inner or mesh.ring
    hops = 2 * mesh.ulysses * layer.segments * mesh.ring * (mesh.ring - 1)
    # In its own window, gradients of a rank's first half return from the last rank, those of its second half from the
    # window's first rank. Where these are one rank, both are one message; the first rank has no second half to send.
    near = mesh.ring // inner * (inner**2 - 2) if inner > 1 else 0
    grads = 2 * mesh.ulysses * layer.segments * (near + mesh.ring * (mesh.ring - inner))
    keys = elements * layer.item
    return Volume(keys, keys + elements * layer.grad_item, hops, hops + grads)


def peer_ring(layer: LayerShape) -> Volume:
    """Return the volume of other implementations' ring: whole shards, R - 1 hops of keys, R of float32 gradients."""
    mesh = layer.layout.mesh
    if mesh.ring == 1:
        return Volume(0, 0, 0, 0)
    keys = layer.key_elements((mesh.ring - 1) * layer.tokens) * layer.item
    grads = layer.key_elements(mesh.ring * layer.tokens) * layer.grad_item
    hops = 2 * mesh.size * (mesh.ring - 1)
    return Volume(keys, keys + grads, hops, hops + 2 * mesh.size * mesh.ring)


def peer_all_to_all(layer: LayerShape, *, repeated: bool) -> Volume:
    """Return the volume of other implementations' Ulysses: four all-to-alls each way.

    Args:
        layer: shape of the layer.
        repeated: keys and values are repeated to the query heads before they are sent (MindSpeed). Otherwise they are
            sent as they are (yunchang, TransformerEngine), which needs U to divide their heads.

    Raises:
        ValueError: Keys are not repeated, and U does not divide their heads.
    """
    ulysses, heads = layer.layout.mesh.ulysses, layer.heads
    if not repeated and heads.kv % ulysses:
        raise ValueError(f"{heads.kv} key-value heads cannot be divided among {ulysses} ranks")
    return _all_to_all(layer, 2 * heads.query + 2 * (heads.query if repeated else heads.kv), collectives=4)


def paper_elements(layer: LayerShape) -> tuple[Fraction, Fraction]:
    """Return the USP paper's count (arXiv 2405.07719, table 2): elements a rank sends by all-to-all and by ring.

    Forward and backward together. The paper takes (U - 1) / U and (R - 1) / R as 1 and counts a ring's gradients with
    its keys: 4 volumes instead of 6. For U and R above 1 the table gives only a bound; its terms are applied to the two
    dimensions of the mesh.

    Args:
        layer: shape of the layer and its mesh.

    Returns:
        Elements by all-to-all and elements by ring; 0 where the degree is 1.
    """
    mesh, heads = layer.layout.mesh, layer.heads
    whole = Fraction(layer.batch * layer.tokens * heads.query * layer.dim)
    shared = Fraction(heads.kv, heads.query)
    exchanged = 4 * whole * (1 + shared) / mesh.size if mesh.ulysses > 1 else Fraction(0)
    return exchanged, 4 * whole * shared / mesh.ulysses if mesh.ring > 1 else Fraction(0)
