"""Flags for checkpoints, beside upstream's."""

import argparse


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to upstream's parser."""
    group = parser.add_argument_group(title="longseq: checkpoints")
    group.add_argument(
        "--ckpt-verify",
        choices=["digests", "sizes"],
        default="digests",
        help="what is compared before a checkpoint is loaded. digests: sizes of files, and checksums of all tensors "
        "with those of the state that was saved; the ranks share the reading. sizes: sizes of files (default: digests)",
    )
    group.add_argument(
        "--ckpt-non-finite",
        choices=["stop", "skip"],
        default="stop",
        help="what to do if parameters or optimizer states are NaN or infinite when a checkpoint is due; they are "
        "never saved. stop: end the run with an error. skip: go on without this checkpoint (default: stop)",
    )
