"""When states are sharded by us."""

from argparse import Namespace

from megatron.longseq.sharding.flags import wants_sharding


def shards(args: Namespace) -> bool:
    """Whether --paro is given."""
    return wants_sharding(args)
