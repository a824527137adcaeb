"""The generated tables of the documentation: what every U x R sends."""

from megatron.longseq.attention.plan.comm_volume import (
    Setup,
    all_to_all,
    paper_elements,
    peer_all_to_all,
    peer_ring,
    ring,
)
from megatron.longseq.attention.plan.heads import Heads, flags, legal_meshes
from megatron.longseq.attention.plan.layout import Layout, Mesh

MIB = 2**20


def meshes(size: int, heads: Heads, tokens: int, dim: int = 128) -> str:
    """Return a markdown table: MiB that a rank sends for one layer, forward and backward, of every legal U x R.

    "Others" pass whole shards round the ring and send key heads as they are, or repeated to the query heads where U
    does not divide them.

    Args:
        size: context-parallel ranks.
        heads: of a tensor-parallel rank.
        tokens: of a sequence; keys, values, queries and outputs in bf16, the ring's gradients in float32.
        dim: of a head.

    Raises:
        ValueError: a length that does not divide.
    """
    lines = [
        "| U x R | flags | all-to-all | ring | together | others | the paper's count |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for pair in legal_meshes(size, heads):
        setup = Setup(Layout(Mesh(*pair), (tokens,)), heads, dim=dim)
        exchanged, passed = all_to_all(setup).bytes, ring(setup).bytes
        others = peer_all_to_all(setup, repeated=heads.kv % pair[0] > 0).bytes + peer_ring(setup).bytes
        counted = float(sum(paper_elements(setup))) * setup.item * size
        numbers = (exchanged, passed, exchanged + passed, others, counted)
        cells = " | ".join(f"{total / MIB / size:.0f}" for total in numbers)
        lines.append(f"| {pair[0]} x {pair[1]} | `{flags(Mesh(*pair))}` | {cells} |")
    return "\n".join(lines)
