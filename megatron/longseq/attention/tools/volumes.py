"""A table of what every U x R sends for one layer: our formulas beside the peers' and the paper's."""

from megatron.longseq.attention.plan.comm_volume import (
    Setup,
    Volume,
    all_to_all,
    paper_elements,
    peer_all_to_all,
    peer_ring,
    ring,
)
from megatron.longseq.attention.plan.heads import Heads, legal_meshes
from megatron.longseq.attention.plan.layout import Layout, Mesh

MIB = 2**20
COLUMNS = (
    ("U x R", "---"),
    ("all-to-all", "--:"),
    ("repeated to Hq", "--:"),
    ("ratio", "--:"),
    ("ring", "--:"),
    ("peers' ring", "--:"),
    ("ratio of keys", "--:"),
    ("ratio", "--:"),
    ("the paper's all-to-all + ring", "--:"),
)


def markdown(size: int, heads: Heads, tokens: int, dim: int = 128) -> str:
    """Return a markdown table: MiB forward + backward, and messages, of all context-parallel ranks together.

    Args:
        size: context-parallel ranks.
        heads: of a tensor-parallel rank.
        tokens: of a sequence; keys, values, queries and outputs in bf16, the ring's gradients in float32.
        dim: of a head.

    Raises:
        ValueError: a length that does not divide.
    """
    names, rules = zip(*COLUMNS, strict=True)
    rows = [_row(Setup(Layout(Mesh(*pair), (tokens,)), heads, dim=dim)) for pair in legal_meshes(size, heads)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rules, *rows))


def _row(setup: Setup) -> list[str]:
    mesh = setup.layout.mesh
    spread, repeated = all_to_all(setup), peer_all_to_all(setup, repeated=True)
    ours, theirs = ring(setup), peer_ring(setup)
    counted = [float(part) * setup.item * mesh.size / MIB for part in paper_elements(setup)]
    return [
        f"{mesh.ulysses} x {mesh.ring}",
        _volume(spread),
        _volume(repeated),
        _ratio(spread.bytes, repeated.bytes),
        _volume(ours),
        _volume(theirs),
        _ratio(ours.forward_bytes, theirs.forward_bytes),
        _ratio(ours.bytes, theirs.bytes),
        f"{counted[0]:.0f} + {counted[1]:.0f}",
    ]


def _volume(volume: Volume) -> str:
    if not volume.bytes:
        return "nothing"
    messages = volume.forward_messages + volume.backward_messages
    return f"{volume.forward_bytes / MIB:.0f} + {volume.backward_bytes / MIB:.0f} MiB, {messages} messages"


def _ratio(ours: int, theirs: int) -> str:
    return f"{ours / theirs:.3f}" if theirs else ""
