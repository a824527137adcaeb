"""When states are sharded by us, and when parameters are frozen."""

from argparse import Namespace

from megatron.longseq.sharding.arguments import wants_sharding


def shards(args: Namespace) -> bool:
    """Whether --paro is given."""
    return wants_sharding(args)


def freezes(args: Namespace) -> bool:
    """Whether --train-only is given, which is a flag of our script alone."""
    return getattr(args, "train_only", None) is not None
