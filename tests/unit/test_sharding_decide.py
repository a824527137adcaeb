"""Flat or not: as asked, or as the clock says for links of given speeds."""

import pytest

from megatron.longseq.sharding.plan.collectives import Kind, Phase, Scope
from megatron.longseq.sharding.plan.flat_or_hierarchical import decide, given_links
from megatron.longseq.sharding.plan.rank_groups import Groups
from megatron.longseq.sharding.plan.ring import Mode
from megatron.longseq.sharding.plan.strategy import Level
from megatron.longseq.sharding.runtime.process_groups import copies_of

FLAT_SCATTER = (Phase(Kind.REDUCE_SCATTER, Scope.FLAT),)
GROUPS = Groups(16, 8)


@pytest.mark.parametrize(("mode", "is_flat"), [(Mode.FLAT, True), (Mode.HIERARCHICAL, False)])
def test_as_asked(mode: Mode, is_flat: bool) -> None:
    assert decide(mode, GROUPS, None)(FLAT_SCATTER, 2**20) is is_flat


def test_overlapped_where_links_differ() -> None:
    assert not decide(Mode.OVERLAPPED, GROUPS, given_links(200.0, 5.0, GROUPS))(FLAT_SCATTER, 2**28)


def test_flat_where_hardly_anything_is_gained() -> None:
    wide = Groups(64, 32)  # of 63 messages round a flat ring, 62 stay inside a group
    assert decide(Mode.OVERLAPPED, wide, given_links(25.0, 25.0, wide))(FLAT_SCATTER, 2**34)
    assert not decide(Mode.OVERLAPPED, wide, given_links(25.0, 0.1, wide))(FLAT_SCATTER, 2**34)


def test_given_speeds_are_gigabytes_per_second() -> None:
    links = given_links(200.0, 5.0, GROUPS)
    assert links.inside.seconds(200e9) == links.between.seconds(5e9) == 1.0


def test_copies_of_optimizer_states() -> None:
    members = [3, 5, 7, 9]
    groups = Groups(4, 2)
    assert copies_of(members, groups, Level.NONE) == [(3,), (5,), (7,), (9,)]
    assert copies_of(members, groups, Level.GROUP) == [(3, 5), (7, 9)]
    assert copies_of(members, groups, Level.GLOBAL) == [(3, 7, 5, 9)]
