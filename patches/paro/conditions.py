"""Predicates on flags: whether model states are sharded, and whether parameters are frozen."""

from argparse import Namespace

from megatron.longseq.sharding.arguments import wants_sharding


def shards(args: Namespace) -> bool:
    """Return whether --paro is given."""
    return wants_sharding(args)


def freezes(args: Namespace) -> bool:
    """Return whether --train-only is given, which only this project's script has."""
    return getattr(args, "train_only", None) is not None
