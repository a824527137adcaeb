"""Sharding strategies: all 27, which 14 are valid, who owns which shard."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.sharding.plan.comm_volume import comm_volume
from megatron.longseq.sharding.plan.memory import Model, memory
from megatron.longseq.sharding.plan.rank_groups import RankGroups, legal_sizes, node_size
from megatron.longseq.sharding.plan.strategy import ALL, KNOWN_AS, RUNNING, VALID, Level, Strategy, check
from megatron.longseq.sharding.plan.time_model import predict
from megatron.longseq.sharding.tools.tables import SEVEN_B

ROOT = Path(__file__).resolve().parents[2]
FOURTEEN = set(["NNN", "NNI", "INI", "NII", "III", "NNG", "ING", "GNG", "NIG", "IIG", "GIG", "NGG", "IGG", "GGG"])
EVEN = Model(64 * 105, 64 * 21)

sizes = st.integers(1, 8)


def test_planning_loads_neither_torch_nor_upstream() -> None:
    planning = sorted(path.stem for path in (ROOT / "megatron/longseq/sharding/plan").glob("*.py"))
    names = [f"plan.{name}" for name in planning] + ["arguments", "tools.tables", "tools.cli"]
    code = "".join(f"import megatron.longseq.sharding.{name}\n" for name in names)
    code += (
        "import sys; print([name for name in ('torch', 'megatron.core', 'megatron.training') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exactly_fourteen_are_valid_and_every_other_says_which_one_dominates_it() -> None:
    assert len(ALL) == 27 and {str(one) for one in VALID} == FOURTEEN
    for one in ALL:
        assert Strategy.parse(str(one)) == one
        if str(one) in FOURTEEN:
            assert one.refusal() is None and one.better == one and check(one) is one
        else:
            with pytest.raises(ValueError, match=f"^{one}: .*give --paro {one.better}$"):
                check(one)


@pytest.mark.parametrize("one", [one for one in ALL if not one.is_valid], ids=str)
def test_the_dominating_one_holds_less_and_sends_no_more(one: Strategy) -> None:
    better = one.better
    assert better.is_valid and (better.params, better.grads) == (one.params, one.grads)
    for (size, count), microbatches in product([(2, 2), (4, 2), (2, 4), (8, 8)], (1, 4)):
        groups = RankGroups(size * count, size)
        assert memory(better, groups, EVEN).total < memory(one, groups, EVEN).total
        ours, theirs = (comm_volume(each, groups, EVEN).step(microbatches) for each in (better, one))
        assert ours.inside <= theirs.inside and ours.between <= theirs.between
        assert (ours.flat, theirs.flat) == (0, 0)
    assert predict(better, SEVEN_B).seconds.step <= predict(one, SEVEN_B).seconds.step * (1 + 1e-12)


def test_no_valid_one_is_dominated_by_making_its_optimizer_states_coarser() -> None:
    """The rule is sharp: no valid strategy becomes another one with fewer bytes and less memory."""
    groups = RankGroups(16, 4)
    for one, other in product(VALID, VALID):
        if (one.params, one.grads) == (other.params, other.grads) and one.optimizer < other.optimizer:
            assert memory(other, groups, EVEN).total < memory(one, groups, EVEN).total
            assert (
                comm_volume(other, groups, EVEN).step(4).collectives
                >= comm_volume(one, groups, EVEN).step(4).collectives
            )


def test_running_ones_are_the_eleven_and_names_are_of_valid_ones() -> None:
    assert len(RUNNING) == 11 and set(RUNNING) < set(VALID)
    assert {str(one) for one in set(VALID) - set(RUNNING)} == {"INI", "GNG", "GIG"}
    assert {Strategy.parse(name) for name in KNOWN_AS} < set(VALID)


@pytest.mark.parametrize("text", ["", "N", "NI", "NIGG", "nig", "NIX", "N I", "012"])
def test_other_words_are_refused_with_what_to_give(text: str) -> None:
    with pytest.raises(ValueError, match=r"give three letters.*such as NIG"):
        Strategy.parse(text)


def test_strategies_are_ordered_by_fineness() -> None:
    assert [str(one) for one in sorted(ALL)] == ["".join(letters) for letters in product("NIG", repeat=3)]
    assert Level.NONE < Level.GROUP < Level.GLOBAL and [level.letter for level in Level] == ["N", "I", "G"]


def test_four_ranks_in_two_groups() -> None:
    groups = RankGroups(4, 2)
    assert [groups.logical(member) for member in range(4)] == [0, 2, 1, 3]
    assert groups.ordered([10, 11, 12, 13]) == (10, 12, 11, 13)
    assert groups.inside([10, 11, 12, 13]) == ((10, 11), (12, 13))
    assert groups.between([10, 11, 12, 13]) == ((10, 12), (11, 13))
    assert [groups.owned(Level.GROUP, member) for member in range(4)] == [range(2), range(2, 4)] * 2
    assert [groups.shards(level) for level in Level] == [1, 2, 4]


@given(sizes, sizes)
def test_logical_ranks_nest_shards_in_slices(size: int, count: int) -> None:
    groups = RankGroups(size * count, size)
    members = list(range(7, 7 + groups.ranks))
    assert sorted(groups.logical(member) for member in range(groups.ranks)) == list(range(groups.ranks))
    for member in range(groups.ranks):
        group, number = divmod(member, size)
        assert groups.logical(member) == number * count + group
        assert groups.member(groups.logical(member)) == member
        shard, piece = groups.owned(Level.GLOBAL, member), groups.owned(Level.GROUP, member)
        assert set(shard) <= set(piece) <= set(groups.owned(Level.NONE, member)) == set(range(groups.ranks))
        assert (shard.start - piece.start, piece.start) == (group, number * count)
        assert members[member] in groups.inside(members)[group] and members[member] in groups.between(members)[number]
    for ring in groups.inside(members):
        assert list(ring) == sorted(ring) and ring[-1] - ring[0] == size - 1
        owned = [groups.owned(Level.GROUP, rank - 7) for rank in ring]
        assert [shard for each in owned for shard in each] == list(range(groups.ranks))
    assert sorted(rank for ring in groups.between(members) for rank in ring) == members


def test_a_group_size_divides_the_ranks() -> None:
    assert legal_sizes(12) == (1, 2, 3, 4, 6, 12)
    assert all(legal_sizes(n) == tuple(m for m in range(1, n + 1) if n % m == 0) for n in range(300))
    assert len(legal_sizes(10**15)) == 256  # without a loop over all numbers
    for ranks, size in ((8, 3), (8, 16), (8, 0), (0, 1), (8, -2)):
        with pytest.raises(ValueError, match="data-parallel ranks cannot be divided into groups of"):
            RankGroups(ranks, size)
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match="among 8 data-parallel ranks"):
            RankGroups(8, 2).logical(wrong)
        with pytest.raises(ValueError, match="among 8 data-parallel ranks"):
            RankGroups(8, 2).member(wrong)
    for wrong_members in ([0, 1, 2], [0, 1, 2, 2]):
        with pytest.raises(ValueError, match="are not 4 different"):
            RankGroups(4, 2).ordered(wrong_members)


@pytest.mark.parametrize(
    ("members", "node", "size"),
    [
        (range(16), 8, 8),
        (range(0, 32, 4), 8, 2),
        (range(3, 64, 8), 8, 1),  # tensor parallelism fills the nodes
        (range(4), 8, 4),
        ([5], 1, 1),
    ],
)
def test_a_node_is_the_default_group(members: range, node: int, size: int) -> None:
    assert node_size(list(members), node) == size
    RankGroups(len(members), node_size(list(members), node))


@pytest.mark.parametrize(("members", "node"), [(range(12), 8), ([0, 8, 1, 9], 8), ([0, 1, 2, 8], 8), ([], 8), ([0], 0)])
def test_nodes_that_are_no_groups_are_refused(members: range, node: int) -> None:
    with pytest.raises(ValueError, match=r"give --paro-group-size|at least 1"):
        node_size(list(members), node)
