"""Command line of context-parallel attention.

`meshes` lists the Ulysses and ring degrees that heads allow, `table` what they send beside other implementations,
`flags` the flags of a training run; `draw` makes a picture of the method.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.longseq.attention.arguments import REFUSALS, add_context_arguments
from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.attention.plan.layout import Mesh
from megatron.longseq.attention.tools import tables
from megatron.longseq.command_line import add_flags_command, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or 1 after an error."""
    return run_command(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron.longseq.attention", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    meshes = commands.add_parser(
        "meshes", help="print a Markdown table of every legal U x R: its flags, and what a rank sends per layer"
    )
    _add_sizes(meshes, needed=True)
    meshes.set_defaults(run=lambda args: tables.meshes(*_sizes(args)))
    table = commands.add_parser(
        "table", help="print a Markdown table of a layer's bytes and messages, with other implementations and the paper"
    )
    _add_sizes(table, needed=False)
    table.set_defaults(run=lambda args: tables.volumes(*_sizes(args)))
    draw = commands.add_parser("draw", help="draw the chunks around the all-to-all, and the blocks of every ring step")
    draw.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write (.svg, .png)")
    draw.add_argument(
        "--hierarchical-context-parallel-sizes", type=int, nargs=2, default=(2, 4), metavar=("U", "R"), help="2 4"
    )
    draw.set_defaults(run=_draw)
    add_flags_command(commands, add_context_arguments, REFUSALS)
    return parser


def _add_sizes(parser: argparse.ArgumentParser, *, needed: bool) -> None:
    """Add upstream's flags; where they are not required, the defaults are 32 heads, 4 key heads and 8 ranks."""
    size, heads, groups, tokens = (None,) * 4 if needed else (8, 32, 4, 32768)
    parser.add_argument("--context-parallel-size", type=int, required=needed, default=size)
    parser.add_argument("--num-attention-heads", type=int, required=needed, default=heads)
    parser.add_argument("--num-query-groups", type=int, default=groups, help=f"default: {groups or 'as many as heads'}")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--kv-channels", type=int, default=128, help="size of a head (default 128)")
    parser.add_argument("--seq-length", type=int, required=needed, default=tokens)


def _sizes(args: argparse.Namespace) -> tuple[int, Heads, int, int]:
    heads = Heads.of(args.num_attention_heads, args.num_query_groups, args.tensor_model_parallel_size)
    return args.context_parallel_size, heads, args.seq_length, args.kv_channels


def _draw(args: argparse.Namespace) -> None:
    from megatron.longseq.attention.tools.figure import draw, scene  # imports matplotlib, which the tables do not need

    draw(scene(Mesh(*args.hierarchical_context_parallel_sizes)), args.output)
