"""Command line of attention over context-parallel ranks: `meshes` that heads allow, `flags` of a training run."""

import argparse
import sys
from collections.abc import Sequence

from megatron.longseq.attention import page
from megatron.longseq.attention.heads import Heads


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 refused."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron.longseq.attention", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    meshes = commands.add_parser(
        "meshes", help="markdown: every legal U x R, its flags, and what a rank sends per layer"
    )
    meshes.add_argument("--context-parallel-size", type=int, required=True)
    meshes.add_argument("--num-attention-heads", type=int, required=True)
    meshes.add_argument("--num-query-groups", type=int, help="default: as many as heads")
    meshes.add_argument("--tensor-model-parallel-size", type=int, default=1)
    meshes.add_argument("--kv-channels", type=int, default=128, help="of a head (default 128)")
    meshes.add_argument("--seq-length", type=int, required=True)
    meshes.set_defaults(run=_meshes)
    ours = commands.add_parser("flags", help="markdown: our flags of a training run, and what is refused")
    ours.set_defaults(run=lambda args: print(f"{page.own_flags()}\n\n{page.refusals()}"))
    return parser


def _meshes(args: argparse.Namespace) -> None:
    heads = Heads.of(args.num_attention_heads, args.num_query_groups, args.tensor_model_parallel_size)
    print(page.meshes(args.context_parallel_size, heads, args.seq_length, args.kv_channels))


if __name__ == "__main__":
    sys.exit(main())
