"""What context parallelism sends for the attention of one layer: exact formulas, ours and other implementations'.

Bytes and messages are summed over the C context-parallel ranks of one tensor-parallel rank, and over a sequence's
segments. In a ring keys and values (or both gradients) are a message each; an all-to-all, an all-gather or a
reduce-scatter counts as one message a rank.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Layout


class Volume(NamedTuple):
    """What is sent: bytes and messages."""

    forward_bytes: int
    backward_bytes: int
    forward_messages: int
    backward_messages: int

    @property
    def bytes(self) -> int:
        """Of forward and backward."""
        return self.forward_bytes + self.backward_bytes


@dataclass(frozen=True, slots=True)
class Setup:
    """One layer's attention.

    Attributes:
        layout: of the tokens.
        heads: of a tensor-parallel rank.
        batch: sequences.
        dim: of a head.
        item: bytes of an element of queries, keys, values and outputs.
        grad_item: bytes of an element of the ring's gradients: 4, float32.
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
        """Segments of the sequence."""
        return len(self.layout.lengths)

    def key_elements(self, rows: int) -> int:
        """Return elements of some rows of keys and values on the rings of all Ulysses indices together."""
        ulysses = self.layout.mesh.ulysses
        return rows * 2 * self.heads.shared(ulysses).kv * self.batch * self.dim * ulysses


def all_to_all(setup: Setup) -> Volume:
    """Ours: queries, keys and values fused, one way; outputs back; in backward the same of the gradients.

    Keys and values are sent to max(Hk, U) heads, never to Hq, and their gradients come back unsummed.
    """
    ulysses = setup.layout.mesh.ulysses
    return _all_to_all(setup, setup.heads.sent(ulysses) + setup.heads.query, collectives=2)


def _all_to_all(setup: Setup, heads: int, collectives: int) -> Volume:
    """Some heads a token, to all ranks of the Ulysses group but the sender itself; backward as forward."""
    ulysses = setup.layout.mesh.ulysses
    if ulysses == 1:
        return Volume(0, 0, 0, 0)
    sent = setup.tokens * (ulysses - 1) * (heads // ulysses) * setup.batch * setup.dim * setup.item
    messages = collectives * setup.layout.mesh.size * setup.segments
    return Volume(sent, sent, messages, messages)


def ring_rows(layout: Layout) -> int:
    """Return rows of keys that one reverse ring sends for causal attention of every segment.

    Of its own segment a rank sends all to the ranks before it and half to those behind; of earlier segments all to all.
    Gradients go home by as many rows.
    """
    ring = layout.mesh.ring
    own = sum(3 * (ring - 1) * length // 4 for length in layout.lengths)
    earlier = sum((ring - 1) * layout.begin(segment) for segment in range(len(layout.lengths)))
    return own + earlier


def ring(setup: Setup, inner: int | None = None) -> Volume:
    """Ours: trimmed, in reverse, keys and values twice (forward and backward), gradients once.

    Args:
        setup: of the layer.
        inner: ranks of a window of a double ring; None: a plain ring. The bytes are the same.
    """
    mesh, elements = setup.layout.mesh, setup.key_elements(ring_rows(setup.layout))
    inner = inner or mesh.ring
    hops = 2 * mesh.ulysses * setup.segments * mesh.ring * (mesh.ring - 1)
    # In its own window a rank's front half comes home from the last rank, its second from the window's first; the two
    # are one message where these are one rank, and the window's first rank has no second half out.
    near = mesh.ring // inner * (inner**2 - 2) if inner > 1 else 0
    grads = 2 * mesh.ulysses * setup.segments * (near + mesh.ring * (mesh.ring - inner))
    keys = elements * setup.item
    return Volume(keys, keys + elements * setup.grad_item, hops, hops + grads)


def gathered(setup: Setup, *, kept: bool) -> Volume:
    """Ours, --cp-comm-type all_gather: keys and values of a segment gathered once, gradients scattered once.

    Args:
        setup: of the layer.
        kept: backward still has what forward gathered (with segments it always has: later ones need it).
    """
    mesh = setup.layout.mesh
    if mesh.ring == 1:
        return Volume(0, 0, 0, 0)
    elements = setup.key_elements((mesh.ring - 1) * setup.tokens)
    messages = mesh.size * setup.segments
    keys, again = elements * setup.item, 0 if kept else 1
    return Volume(keys, again * keys + elements * setup.grad_item, messages, (1 + again) * messages)


def peer_ring(setup: Setup) -> Volume:
    """A ring as others have it: whole shards, R - 1 hops of keys, R of float32 gradients, K and V apart."""
    mesh = setup.layout.mesh
    if mesh.ring == 1:
        return Volume(0, 0, 0, 0)
    keys = setup.key_elements((mesh.ring - 1) * setup.tokens) * setup.item
    grads = setup.key_elements(mesh.ring * setup.tokens) * setup.grad_item
    hops = 2 * mesh.size * (mesh.ring - 1)
    return Volume(keys, keys + grads, hops, hops + 2 * mesh.size * mesh.ring)


def peer_all_to_all(setup: Setup, *, repeated: bool) -> Volume:
    """Ulysses as others have it, four all-to-alls each way.

    Args:
        setup: of the layer.
        repeated: keys and values are repeated to the query heads before they are sent (MindSpeed); else they are sent
            as they are (yunchang, TransformerEngine), which needs U to divide their heads.

    Raises:
        ValueError: not repeated, and U does not divide the heads.
    """
    ulysses, heads = setup.layout.mesh.ulysses, setup.heads
    if not repeated and heads.kv % ulysses:
        raise ValueError(f"{heads.kv} heads of keys and values over {ulysses} ranks: none without repeating them")
    return _all_to_all(setup, 2 * heads.query + 2 * (heads.query if repeated else heads.kv), collectives=4)


def paper_elements(setup: Setup) -> tuple[Fraction, Fraction]:
    """Return the USP paper's own count (its table 2), elements a rank sends: (all-to-all, ring), forward and backward.

    It takes (U - 1) / U and (R - 1) / R as 1 and counts a ring's gradients with the keys: 4 instead of 6 volumes. For
    U and R both above 1, where the table gives a bound alone, its terms are applied to the mesh's two directions.
    """
    mesh, heads = setup.layout.mesh, setup.heads
    whole = Fraction(setup.batch * setup.tokens * heads.query * setup.dim)
    shared = Fraction(heads.kv, heads.query)
    spread = 4 * whole * (1 + shared) / mesh.size if mesh.ulysses > 1 else Fraction(0)
    return spread, 4 * whole * shared / mesh.ulysses if mesh.ring > 1 else Fraction(0)
