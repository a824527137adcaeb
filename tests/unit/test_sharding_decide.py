"""Collectives run flat as the flag says, or as the time model predicts for the bandwidths of links."""

import pytest

from megatron.longseq.sharding.plan.collectives import Collective, CollectiveKind, CollectivesMode, Scope
from megatron.longseq.sharding.plan.flat_or_hierarchical import flat_chooser, given_links
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.process_groups import copies_of

FLAT_SCATTER = (Collective(CollectiveKind.REDUCE_SCATTER, Scope.FLAT),)
GROUPS = RankGroups(16, 8)


@pytest.mark.parametrize(("mode", "is_flat"), [(CollectivesMode.FLAT, True), (CollectivesMode.HIERARCHICAL, False)])
def test_as_asked(mode: CollectivesMode, is_flat: bool) -> None:
    assert flat_chooser(mode, GROUPS, None)(FLAT_SCATTER, 2**20) is is_flat


def test_overlapped_where_links_differ() -> None:
    assert not flat_chooser(CollectivesMode.OVERLAPPED, GROUPS, given_links(200.0, 5.0, GROUPS))(FLAT_SCATTER, 2**28)


def test_flat_where_hardly_anything_is_gained() -> None:
    wide = RankGroups(64, 32)  # of 63 messages round a flat ring, 62 stay inside a group
    assert flat_chooser(CollectivesMode.OVERLAPPED, wide, given_links(25.0, 25.0, wide))(FLAT_SCATTER, 2**34)
    assert not flat_chooser(CollectivesMode.OVERLAPPED, wide, given_links(25.0, 0.1, wide))(FLAT_SCATTER, 2**34)


def test_given_speeds_are_gigabytes_per_second() -> None:
    links = given_links(200.0, 5.0, GROUPS)
    assert links.inside.seconds(200e9) == links.between.seconds(5e9) == 1.0


def test_copies_of_optimizer_states() -> None:
    members = [3, 5, 7, 9]
    groups = RankGroups(4, 2)
    assert copies_of(members, groups, Level.NONE) == [(3,), (5,), (7,), (9,)]
    assert copies_of(members, groups, Level.GROUP) == [(3, 5), (7, 9)]
    assert copies_of(members, groups, Level.GLOBAL) == [(3, 7, 5, 9)]
