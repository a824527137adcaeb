"""Data-parallel ranks in groups of m: which ranks form a group, and which shard of a buffer each rank owns.

A *member* is a data-parallel rank as upstream numbers it: member k * m + i is number i of group k. Its *logical* rank
is i * G + k. Buffers are cut into n shards by logical rank. So the slice of number i (1/m of the buffer) holds the
shards of number i of all groups, one after another: a reduce-scatter inside groups and one between groups, each in
place on contiguous memory, leave exactly what the flat one leaves, and all-gathers invert it. Nothing is permuted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron.longseq.sharding.plan.strategy import Level


def legal_sizes(ranks: int) -> tuple[int, ...]:
    """Return every valid group size: the divisors of the number of ranks."""
    if ranks < 1:
        return ()
    found, rest, prime = [1], ranks, 2
    while rest > 1:
        if prime * prime > rest:
            prime = rest  # the last prime factor
        powers = [1]
        while rest % prime == 0:
            rest //= prime
            powers.append(powers[-1] * prime)
        found = [size * power for size in found for power in powers]
        prime += 1 if prime == 2 else 2
    return tuple(sorted(found))


@dataclass(frozen=True, slots=True)
class RankGroups:
    """n data-parallel ranks (times context-parallel ones) in G groups of m neighbours; no process groups.

    Attributes:
        ranks: n.
        size: m. With 1, a state of level I is not sharded; with n, it is sharded globally.

    Raises:
        ValueError: the size does not divide the number of ranks.
    """

    ranks: int
    size: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.size < 1 or self.ranks % self.size:
            raise ValueError(
                f"{self.ranks} data-parallel ranks cannot be divided into groups of {self.size}; give "
                f"--paro-group-size one of {list(legal_sizes(self.ranks))}"
            )

    @property
    def count(self) -> int:
        """The number of groups, G."""
        return self.ranks // self.size

    def shards(self, level: Level) -> int:
        """Return the number of shards of a state at a level."""
        return (1, self.size, self.ranks)[level]

    def logical(self, member: int) -> int:
        """Return a member's logical rank, which is the number of the shard that it owns.

        Raises:
            ValueError: there is no such member.
        """
        if not 0 <= member < self.ranks:
            raise ValueError(f"there is no member {member} among {self.ranks} data-parallel ranks")
        return member % self.size * self.count + member // self.size

    def member(self, logical: int) -> int:
        """Return the member of a logical rank.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= logical < self.ranks:
            raise ValueError(f"there is no logical rank {logical} among {self.ranks} data-parallel ranks")
        return logical % self.count * self.size + logical // self.count

    def owned(self, level: Level, member: int) -> range:
        """Return which of a buffer's n shards a member keeps of a state at a level.

        Args:
            level: level of the state.
            member: data-parallel rank, as upstream numbers it.

        Returns:
            Indices of shards, 0 to n - 1.
        """
        parts = self.shards(level)
        width = self.ranks // parts
        part = self.logical(member) // width
        return range(part * width, (part + 1) * width)

    def ordered(self, members: Sequence[int]) -> tuple[int, ...]:
        """Return global ranks in logical order, for `new_group(..., sort_ranks=False)`.

        Args:
            members: global ranks of the data-parallel group, in upstream's order.

        Raises:
            ValueError: there are not n of them, or one is listed twice.
        """
        if len(members) != self.ranks or len(set(members)) != len(members):
            raise ValueError(f"{list(members)} are not {self.ranks} different data-parallel ranks")
        return tuple(members[self.member(logical)] for logical in range(self.ranks))

    def inside(self, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the global ranks of every group, in the order of their numbers.

        Args:
            members: global ranks of the data-parallel group, in upstream's order.

        Raises:
            ValueError: see `ordered`.
        """
        ranks = self.ordered(members)
        return tuple(ranks[group :: self.count] for group in range(self.count))

    def between(self, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return, for every number, the global ranks that have it, in the order of their groups.

        Args:
            members: global ranks of the data-parallel group, in upstream's order.

        Raises:
            ValueError: see `ordered`.
        """
        ranks = self.ordered(members)
        return tuple(ranks[number * self.count : (number + 1) * self.count] for number in range(self.size))


def node_size(members: Sequence[int], node_ranks: int) -> int:
    """Return the default group size: the number of neighbours in the data-parallel group that share a node.

    Args:
        members: global ranks of the data-parallel group, in upstream's order.
        node_ranks: ranks on a node.

    Raises:
        ValueError: nodes have different numbers of data-parallel ranks, or those of a node are not neighbours.
    """
    if node_ranks < 1 or not members:
        raise ValueError(f"{len(members)} data-parallel ranks on nodes of {node_ranks} ranks: both must be at least 1")
    runs = [(node, len(list(run))) for node, run in groupby(members, key=lambda rank: rank // node_ranks)]
    sizes = {size for _, size in runs}
    if len(sizes) > 1 or len({node for node, _ in runs}) < len(runs):
        raise ValueError(
            f"data-parallel ranks {list(members)} are distributed unevenly over nodes of {node_ranks} ranks, so a "
            f"node cannot be a group; give --paro-group-size one of {list(legal_sizes(len(members)))}"
        )
    return sizes.pop()
