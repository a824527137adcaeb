"""The planner's commands."""

import argparse
import sys
from collections.abc import Sequence

from megatron.longseq.command_line import run_command
from megatron.longseq.planner.tools.calibrate import add_calibrate_command
from megatron.longseq.planner.tools.grid_command import add_grid_command
from megatron.longseq.planner.tools.predict_command import add_predict_command, separate_flags
from megatron.longseq.planner.tools.search_command import add_search_command
from megatron.longseq.planner.tools.training_flags import join_training_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the command line; None: that of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron.longseq.planner",
        description="predict the time and memory of training runs, and search for the fastest one",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_predict_command(commands)
    add_search_command(commands)
    add_grid_command(commands)
    add_calibrate_command(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["predict"]:
        words = ["predict", *separate_flags(words[1:])]
    elif words[:1] == ["search"]:
        words = join_training_flags(words)
    return run_command(parser, words)
