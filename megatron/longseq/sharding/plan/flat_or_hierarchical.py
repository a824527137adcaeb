"""Whether a bucket's collective runs over all ranks at once, or inside and between groups."""

from functools import cache

from megatron.longseq.sharding.plan.collectives import Decide, Phases
from megatron.longseq.sharding.plan.linkfit import pick
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.ring import Mode
from megatron.longseq.sharding.plan.time_model import Link, Links

GIGABYTE = 1e9
BUCKETS = 8  # of which a message is taken to consist: phases of neighbours overlap, but for the first and the last


def given_links(inside: float, between: float, groups: Groups) -> Links:
    """Return links of speeds that a user gives (--paro-links).

    Args:
        inside, between: gigabytes per second that a rank sends to ranks of its group, and to other groups.
        groups: the ranks; a flat ring is taken to leave a group over the links of all its ranks, as NCCL's do.
    """
    return Links(Link(inside * GIGABYTE), Link(between * GIGABYTE), groups.size)


def decide(mode: Mode, groups: Groups, links: Links | None) -> Decide:
    """Return what says whether phases of a bucket, which are one flat collective, run as that.

    Args:
        mode: --paro-collectives. Overlapped, the clock of `ringtime` decides, and flat is taken where it is not slower
            by more than what the clock may err.
        groups: the ranks.
        links: their speeds; needed where overlapped.
    """
    if mode is not Mode.OVERLAPPED:
        return lambda phases, size: mode is Mode.FLAT
    assert links is not None, "overlapped collectives are chosen by the speed of links"

    @cache
    def is_flat(phases: Phases, size: int) -> bool:
        shards = [size / groups.ranks] * BUCKETS
        return pick(phases[0].kind, groups, links, shards).mode is Mode.FLAT

    return is_flat
