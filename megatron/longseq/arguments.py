"""Our command-line flags, one argument group per system, handed to upstream's parser through its extra-arguments hook."""

import argparse


def add_longseq_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every system's group of flags to upstream's parser and return the parser (upstream's hook wants it back)."""
    return parser


def validate_longseq_arguments(args: argparse.Namespace) -> None:
    """Refuse unsupported combinations of our flags right after parsing, before any process group exists.

    Raises:
        ValueError: names the flag, the reason and what to do.
    """
