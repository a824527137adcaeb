"""Markdown tables of the documentation: what every U x R sends."""

from megatron.longseq.attention.plan.comm_volume import (
    LayerShape,
    Volume,
    all_to_all,
    paper_elements,
    peer_all_to_all,
    peer_ring,
    ring,
)
from megatron.longseq.attention.plan.heads import Heads, legal_meshes, mesh_flags
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.command_line import markdown_table

MIB = 2**20


def meshes(size: int, heads: Heads, tokens: int, dim: int = 128) -> str:
    """Return a table of the MiB that a rank sends for one layer, forward and backward, for every legal U x R.

    "Others" send whole shards round the ring, and key heads as they are, or repeated to the query heads where U does
    not divide them.

    Args:
        size: context-parallel ranks.
        heads: heads of a tensor-parallel rank.
        tokens: tokens of a sequence; keys, values, queries and outputs in bf16, the ring's gradients in float32.
        dim: size of a head.

    Raises:
        ValueError: The length cannot be divided among the ranks.
    """
    lines = []
    for layer in _layers(size, heads, tokens, dim):
        mesh = layer.layout.mesh
        exchanged, passed = all_to_all(layer).bytes, ring(layer).bytes
        others = peer_all_to_all(layer, repeated=heads.kv % mesh.ulysses > 0).bytes + peer_ring(layer).bytes
        counted = float(sum(paper_elements(layer))) * layer.item * size
        numbers = (exchanged, passed, exchanged + passed, others, counted)
        cells = [f"{total / MIB / size:.0f}" for total in numbers]
        lines.append([f"{mesh.ulysses} x {mesh.ring}", f"`{mesh_flags(mesh)}`", *cells])
    names = ("U x R", "flags", "all-to-all", "ring", "together", "others", "the paper's count")
    return markdown_table(names, lines, "|---|---|--:|--:|--:|--:|--:|")


def volumes(size: int, heads: Heads, tokens: int, dim: int = 128) -> str:
    """Return a table of MiB (forward + backward) and messages of all context-parallel ranks together; see `meshes`."""
    names = (
        "U x R",
        "all-to-all",
        "repeated to Hq",
        "ratio",
        "ring",
        "peers' ring",
        "ratio of keys",
        "ratio",
        "the paper's all-to-all + ring",
    )
    lines = [_volumes_of(layer) for layer in _layers(size, heads, tokens, dim)]
    return markdown_table(names, lines, f"|---|{'--:|' * (len(names) - 1)}")


def _volumes_of(layer: LayerShape) -> list[str]:
    mesh = layer.layout.mesh
    exchanged, repeated = all_to_all(layer), peer_all_to_all(layer, repeated=True)
    ours, theirs = ring(layer), peer_ring(layer)
    counted = [float(part) * layer.item * mesh.size / MIB for part in paper_elements(layer)]
    return [
        f"{mesh.ulysses} x {mesh.ring}",
        _volume(exchanged),
        _volume(repeated),
        _ratio(exchanged.bytes, repeated.bytes),
        _volume(ours),
        _volume(theirs),
        _ratio(ours.forward_bytes, theirs.forward_bytes),
        _ratio(ours.bytes, theirs.bytes),
        f"{counted[0]:.0f} + {counted[1]:.0f}",
    ]


def _layers(size: int, heads: Heads, tokens: int, dim: int) -> list[LayerShape]:
    return [LayerShape(Layout(Mesh(*pair), (tokens,)), heads, dim=dim) for pair in legal_meshes(size, heads)]


def _volume(volume: Volume) -> str:
    if not volume.bytes:
        return "nothing"
    messages = volume.forward_messages + volume.backward_messages
    return f"{volume.forward_bytes / MIB:.0f} + {volume.backward_bytes / MIB:.0f} MiB, {messages} messages"


def _ratio(ours: int, theirs: int) -> str:
    return f"{ours / theirs:.3f}" if theirs else ""
