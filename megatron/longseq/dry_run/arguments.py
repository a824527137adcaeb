"""Flags of the dry run."""

import os
from argparse import ArgumentParser, Namespace

from megatron.longseq.refusals import Refusals, is_dry_run, refuse, refuse_without_effect

MOST_RANKS = 4096

# flag: (whether it is used, why it does not work in a dry run)
NOT_IN_A_DRY_RUN: Refusals = {
    "--use-megatron-fsdp": (lambda a: a.use_megatron_fsdp, "it moves parameters between devices as it wraps the model"),
    "--use-torch-fsdp2": (lambda a: a.use_torch_fsdp2, "it creates a device mesh of its own"),
    "--skip-train": (lambda a: a.skip_train, "it reports the memory of training; leave it out"),
    "--load": (lambda a: a.load is not None, "the meta device has no values; leave it out, its weights change no size"),
    "--pretrained-checkpoint": (
        lambda a: a.pretrained_checkpoint is not None,
        "the meta device has no values; leave it out, its weights change no size",
    ),
    "--fp8-format": (lambda a: a.fp8 or a.fp4, "TransformerEngine quantizes weights on a GPU only"),
    "--optimizer-cpu-offload": (lambda a: a.optimizer_cpu_offload, "it copies states, which the meta device lacks"),
}


def add_dry_run_arguments(parser: ArgumentParser) -> None:
    """Add the group of arguments of the dry run."""
    group = parser.add_argument_group(title="longseq: dry run")
    group.add_argument(
        "--dry-run-world",
        type=int,
        metavar="N",
        help=f"build the model of one rank of a job of N ranks (at most {MOST_RANKS}) in this process, without memory "
        "or communication; check groups, sizes and patches, print the rank's memory, and exit",
    )
    group.add_argument(
        "--dry-run-rank",
        type=int,
        metavar="R",
        help="with --dry-run-world: the rank; default 0",
    )


def check_dry_run(args: Namespace) -> None:
    """Refuse invalid numbers and flags; then make this process the rank of a job over fake process groups.

    Raises:
        ValueError: a flag has no effect, is out of range, or cannot be combined.
    """
    if not is_dry_run(args):
        refuse_without_effect(args, "--dry-run-world is not given", dry_run_rank=None)
        return
    world, rank = args.dry_run_world, args.dry_run_rank or 0
    if not 1 <= world <= MOST_RANKS:
        raise ValueError(f"--dry-run-world {world}: give a number of ranks from 1 to {MOST_RANKS}.")
    if not 0 <= rank < world:
        raise ValueError(f"--dry-run-rank {rank}: give a rank from 0 to {world - 1}, as --dry-run-world is {world}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not getattr(args, "fake_process_group", False):
        raise ValueError("--dry-run-world: a dry run is one process; start it without torchrun or with one process.")
    refuse(args, [("--dry-run-world", NOT_IN_A_DRY_RUN)])
    args.dry_run_rank = rank
    args.rank, args.world_size, args.local_rank, args.fake_process_group = rank, world, 0, True
