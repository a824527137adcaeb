"""The choice, bucket by bucket, between one flat collective and collectives inside and between groups."""

from collections.abc import Sequence
from functools import cache

from megatron.longseq.sharding.plan.collectives import (
    CollectiveKind,
    Collectives,
    CollectivesMode,
    FlatChooser,
    always_flat,
    never_flat,
)
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.time_model import LinkSpeed, LinkSpeeds, ring_seconds

GIGABYTE = 1e9
DEFAULT_LINKS = (200.0, 25.0)  # GB/s: NVLink inside a node, one 200 Gbit/s adapter for each GPU between nodes
BUCKETS = 8  # that a message is assumed to have, so that collectives of neighbouring buckets overlap
MARGIN = 0.05  # by how much another mode must beat the flat collective: the error of the time model


def given_links(inside: float, between: float, groups: RankGroups) -> LinkSpeeds:
    """Return the link speeds that --paro-links names.

    Args:
        inside, between: GB/s that a rank sends to ranks of its own group, and to other groups.
        groups: the data-parallel ranks. A flat ring is assumed to leave a group over the links of all its ranks, as
            NCCL's rings do.
    """
    return LinkSpeeds(LinkSpeed(inside * GIGABYTE), LinkSpeed(between * GIGABYTE), groups.size)


def choose_mode(
    kind: CollectiveKind,
    groups: RankGroups,
    links: LinkSpeeds,
    shards: Sequence[float],
    *,
    margin: float = MARGIN,
) -> CollectivesMode:
    """Return the mode that is predicted to be fastest: flat, unless another one is faster by more than a margin.

    Args:
        kind, groups, links, shards: see `ring_seconds`.
        margin: by how much the flat collective has to be beaten.
    """
    times = {mode: ring_seconds(kind, mode, groups, links, shards) for mode in CollectivesMode}
    best = min(CollectivesMode, key=lambda mode: times[mode])  # the first, and simplest, of equally fast ones
    return best if times[best] * (1 + margin) < times[CollectivesMode.FLAT] else CollectivesMode.FLAT


def flat_chooser(mode: CollectivesMode, groups: RankGroups, links: LinkSpeeds) -> FlatChooser:
    """Return the function that decides whether a bucket's collectives run as one flat collective.

    Args:
        mode: --paro-collectives. Under `overlapped` the time model decides, for the bucket's size.
        groups: the data-parallel ranks.
        links: their speeds; used under `overlapped` only.
    """
    if mode is not CollectivesMode.OVERLAPPED:
        return always_flat if mode is CollectivesMode.FLAT else never_flat

    @cache
    def is_flat(collectives: Collectives, size: int) -> bool:
        shards = [size / groups.ranks] * BUCKETS
        return choose_mode(collectives[0].kind, groups, links, shards) is CollectivesMode.FLAT

    return is_flat
