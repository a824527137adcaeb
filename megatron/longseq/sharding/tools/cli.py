"""Command line of sharding strategies: `choose` one for your sizes, `probe` the links of a job, `draw` the method, and
the `table` and `flags` of the documentation.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.longseq.command_line import add_flags_command, run_command
from megatron.longseq.sharding.arguments import REFUSALS, add_sharding_arguments
from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.memory import Model
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import ComputeTime, LinkSpeed, LinkSpeeds, TrainingJob
from megatron.longseq.sharding.tools import tables as page


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or 1 after an error."""
    return run_command(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron.longseq.sharding", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    table = commands.add_parser("table", help="print Markdown tables: the costs of all strategies, and which to choose")
    table.set_defaults(run=lambda args: page.page())
    add_flags_command(commands, add_sharding_arguments, REFUSALS)
    draw = commands.add_parser("draw", help="draw shards by rank, both links over time, memory and communication")
    draw.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write (.svg, .png)")
    draw.set_defaults(run=_draw)
    probe = commands.add_parser("probe", help="measure links and print --paro-links; run under torchrun on all ranks")
    probe.add_argument("--paro-group-size", type=int, help="ranks of a group (default: those of a node)")
    probe.set_defaults(run=_probe)
    choose = commands.add_parser("choose", help="print a Markdown table of the strategies that fit, fastest first")
    choose.add_argument("--params", type=float, required=True, help="parameters of a model-parallel rank")
    choose.add_argument("--trainable", type=float, help="trained parameters (default: all)")
    choose.add_argument("--ranks", type=int, required=True, help="data-parallel times context-parallel ranks")
    choose.add_argument("--paro-group-size", type=int, required=True, help="ranks of a group")
    choose.add_argument(
        "--paro-collectives", choices=[mode.value for mode in CollectivesMode], default=CollectivesMode.OVERLAPPED.value
    )
    choose.add_argument("--microbatches", type=int, required=True, help="micro-batches of a rank per step, A")
    choose.add_argument("--memory-gb", type=float, help="memory for the model states of a rank (default: no limit)")
    choose.add_argument("--inside-gbs", type=float, required=True, help="bandwidth of a rank inside its group, in GB/s")
    choose.add_argument("--between-gbs", type=float, required=True, help="bandwidth of a rank between groups, in GB/s")
    choose.add_argument("--inside-latency", type=float, default=3e-6, help="latency in seconds (default 3e-6)")
    choose.add_argument("--between-latency", type=float, default=15e-6, help="latency in seconds (default 15e-6)")
    choose.add_argument("--channels", type=int, help="links that a flat ring uses (default: one per rank of a group)")
    choose.add_argument("--buckets", type=int, default=8, help="buckets of parameters and of gradients (default 8)")
    choose.add_argument("--forward-seconds", type=float, default=0.0, help="compute of a micro-batch (default 0)")
    choose.add_argument("--backward-seconds", type=float, default=0.0, help="compute of a micro-batch (default 0)")
    choose.add_argument("--hidden", type=float, default=0.0, help="share of compute that hides communication, 0 to 1")
    choose.set_defaults(run=_choose)
    return parser


def _choose(args: argparse.Namespace) -> str:
    params = int(args.params)
    job = TrainingJob(
        groups=RankGroups(args.ranks, args.paro_group_size),
        model=Model(params, params if args.trainable is None else int(args.trainable)),
        work=ComputeTime(args.microbatches, args.forward_seconds, args.backward_seconds, args.hidden),
        links=LinkSpeeds(
            LinkSpeed(args.inside_gbs * 1e9, args.inside_latency),
            LinkSpeed(args.between_gbs * 1e9, args.between_latency),
            args.paro_group_size if args.channels is None else args.channels,
        ),
        mode=CollectivesMode(args.paro_collectives),
        buckets=args.buckets,
    )
    limit = None if args.memory_gb is None else args.memory_gb * 1e9
    return f"{page.setting(job)}\n\n{page.ranked(job, limit)}"


def _draw(args: argparse.Namespace) -> str:
    from megatron.longseq.sharding.tools.figure import draw, scene

    draw(scene(), args.output)
    return str(args.output)


def _probe(args: argparse.Namespace) -> str | None:
    from megatron.longseq.sharding.tools.probe_links import probe_this_job

    return probe_this_job(args.paro_group_size)
