"""The generated parts of the documentation's page: the flags, what they refuse, and what every U x R sends."""

from argparse import ArgumentParser

from megatron.longseq.attention.arguments import NOT_WITH_CONTEXT, add_context_arguments
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


def own_flags() -> str:
    """Return a markdown table of our flags, their defaults and their help."""
    parser = ArgumentParser(add_help=False)
    add_context_arguments(parser)
    lines = ["| flag | default | |", "|---|---|---|"]
    for action in parser._actions:
        takes = f" {action.metavar or '|'.join(action.choices or ())}".rstrip().replace("|", r"\|")
        default = "off" if action.default is None or action.default is False else str(action.default)
        lines.append(f"| `{action.option_strings[0]}{takes}` | {default} | {action.help} |")
    return "\n".join(lines)


def refusals() -> str:
    """Return a markdown table of the flags that attention over context-parallel ranks refuses, and why."""
    lines = ["| refused | why |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{flag}` | {why} |" for flag, (_, why) in NOT_WITH_CONTEXT.items())])


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
